// 1. Keep the <i> elements that ipywidgets' Play looks up after Font Awesome has drawn the icon.
window.FontAwesomeConfig = { autoReplaceSvg: "nest" };
// 2. The widget manager still calls MathJax 2's Hub.Queue: hand it MathJax 3's typesetPromise.
document.addEventListener("DOMContentLoaded", () => {
  const maths = window.MathJax;
  if (maths && !maths.Hub) maths.Hub = { Queue: (call) => maths.typesetPromise && maths.typesetPromise([call[2]]) };
});
// 3. The theme binds the contents menu to the first button of its kind, which stands in a bar that is never shown. The theme's
//    script is deferred: what is removed when the page has been read is gone before the theme looks.
document.addEventListener("readystatechange", () => {
  document.querySelectorAll(".bd-header .primary-toggle, .bd-header .secondary-toggle").forEach((button) => button.remove());
});
