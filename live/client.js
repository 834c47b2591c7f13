/* The model in a worker, for any page that wants answers of it.
 *
 * LIVE (data.js) has the kernels, the manifest of the weights and the worker's source.
 */
"use strict";

const NEEDED = 1; // GB that a device must say it has; the model takes half of one

const fromBase64 = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const megabytes = () => Math.round(LIVE.manifest.shards.reduce((sum, { bytes }) => sum + bytes, 0) / 1e6);

// Why the model cannot run here, in words; null where it can
function obstacle() {
  if (typeof LIVE === "undefined") return "The data of this page is missing: build the book with `make book`.";
  if (LIVE.missing) return `The model was not packed when this book was built: ${LIVE.missing}`;
  if (typeof WebAssembly === "undefined" || !WebAssembly.validate(fromBase64(LIVE.kernels))) {
    return "This browser has no WebAssembly with 128-bit vectors (SIMD). Chrome 91, Firefox 89 and Safari 16.4 were the first to have it.";
  }
  if (navigator.deviceMemory && navigator.deviceMemory < NEEDED) {
    return `The model takes half a gigabyte of memory, and this device says that it has ${navigator.deviceMemory} GB in all.`;
  }
  return null;
}

// The atlas of data.js with its pixels, for scene.js
async function decodedAtlas({ image, ...rest }) {
  const picture = new Image();
  picture.src = image;
  await picture.decode();
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [picture.width, picture.height];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(picture, 0, 0);
  return { ...rest, pixels: context.getImageData(0, 0, picture.width, picture.height).data };
}

class Client {
  /* `folder` is where the shards lie, seen from the page. `replies` has a function for each kind
   * of the worker's replies that matters: progress, ready, word, done, lens, collected; and
   * `failed`, which is told whether it was while loading. */
  constructor(folder, replies) {
    this.folder = folder;
    this.replies = replies;
    this.ready = false;
    const source = new Blob([LIVE.worker], { type: "text/javascript" });
    this.worker = new Worker(URL.createObjectURL(source));
    this.worker.onmessage = ({ data }) => this.answer(data);
    this.worker.onerror = (event) => replies.failed({ text: event.message, loading: !this.ready });
    const served = location.protocol.startsWith("http");
    const beside = served ? new URL(folder, location.href).href : null;
    const { kernels, manifest } = LIVE;
    this.send({ kind: "load", kernels: fromBase64(kernels), manifest, folder: beside });
  }

  send(message) {
    this.worker.postMessage(message);
  }

  answer(data) {
    if (data.kind === "want") {
      this.loadScript(data);
      return;
    }
    this.ready ||= data.kind === "ready";
    this.replies[data.kind]?.(data);
  }

  /* Opened from disk: a shard is a script that hands its bytes to liveShard. In x-user-defined
   * each byte is one character, whose lowest eight bits are the byte. */
  loadScript({ k, again }) {
    const { file, sha256 } = LIVE.manifest.shards[k];
    const script = document.createElement("script");
    script.charset = "x-user-defined";
    script.src = `${this.folder}${file}${again ? "?again" : ""}`;
    const send = (bytes) => {
      script.remove();
      this.worker.postMessage({ kind: "shard", k, bytes }, [bytes.buffer]);
    };
    let arrived = false;
    window.liveShard = (name, text) => {
      if (!sha256.startsWith(name)) return;
      arrived = true;
      const bytes = new Uint8Array(text.length);
      for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
      send(bytes);
    };
    // a file that was cut is no script any more, and hands over nothing
    script.onload = () => { if (!arrived) send(new Uint8Array(0)); };
    script.onerror = () => this.replies.failed({ text: `${file} is missing beside the page`, loading: true });
    document.head.append(script);
  }
}
