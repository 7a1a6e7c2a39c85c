// Connects the page to onnxruntime: loads the model, and writes a text on when asked to.
import * as ort from "./ort.wasm.min.mjs";
import { Pieces, complete } from "./text.js";

const MOST = 24; // words that are written
const at = (id) => document.getElementById(id);
const mib = (bytes) => (bytes / 2 ** 20).toFixed(2);

ort.env.wasm.numThreads = 1;
ort.env.wasm.wasmPaths = "./";

async function load() {
  const [about, model] = await Promise.all([
    fetch("about.json").then((found) => found.json()),
    fetch("model.onnx").then((found) => found.arrayBuffer()),
  ]);
  const session = await ort.InferenceSession.create(model, { executionProviders: ["wasm"] });
  await scorer(session)([2]); // the first step of a session takes longer
  at("facts").textContent =
    `The model has ${mib(model.byteLength)} MiB; the dense network has ${mib(about.dense_bytes)} MiB. ` +
    `Nothing you type leaves this page.`;
  return { pieces: new Pieces(about), session };
}

// Computes the scores of the word after the numbers. It keeps the keys and values of those that it has seen, so that
// each word costs a step of the network (`export-onnx --part step`).
function scorer(session) {
  const sizes = session.inputMetadata.find(({ name }) => name === "past").shape;
  const [layers, two, , heads, , channels] = sizes;
  let past = new ort.Tensor("float32", new Float32Array(0), [layers, two, 1, heads, 0, channels]);
  let seen = 0;
  return async (numbers) => {
    const fresh = BigInt64Array.from(numbers.slice(seen), BigInt);
    const tokens = new ort.Tensor("int64", fresh, [1, fresh.length]);
    const { scores, present } = await session.run({ tokens, past });
    [past, seen] = [present, numbers.length];
    return scores.data.subarray((fresh.length - 1) * scores.dims[2]);
  };
}

async function write({ pieces, session }) {
  const [given, began] = [at("text").value, performance.now()];
  let count = 0;
  at("write").disabled = true;
  for await (const text of complete(pieces, given, MOST, scorer(session))) {
    count++;
    at("given").textContent = given;
    at("more").textContent = text.startsWith(given) ? text.slice(given.length) : ` → ${text}`;
  }
  const each = (performance.now() - began) / Math.max(count, 1);
  at("time").textContent = `${count} words, ${each.toFixed(1)} ms each, on one thread of this browser`;
  at("write").disabled = false;
}

try {
  const loaded = await load();
  at("form").addEventListener("submit", (event) => {
    event.preventDefault();
    write(loaded).catch(show);
  });
  at("write").disabled = false;
} catch (error) {
  show(error);
}

function show(error) {
  at("time").textContent = `It does not work here: ${error}`;
}
