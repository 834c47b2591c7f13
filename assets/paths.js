// Find the widget manager's fonts in its own folder instead of under the page's.
window.requirejs.config({ baseUrl: new URL("vendor/widgets/", document.currentScript.src).href });
