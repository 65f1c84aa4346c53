/** The page: what is asked, what came back, and how the parts are told of it. */
import * as api from "./api.js";
import { BoxEditor } from "./boxes.js";
import { byId, copyText, download, make, newUuid, replaceKeepingFocus } from "./dom.js";
import { errorCard } from "./errors.js";
import { cocoDocument, drawPng } from "./exports.js";
import { colourOf, cssOf } from "./palette.js";
import { describe, describeShortly, filterGroups, modelLine, resultGroup, tick, timeBars } from "./panel.js";
import { decodeEnds } from "./rle.js";
import { snippet } from "./snippets.js";
import { Stage } from "./stage.js";

const USER_ID = "playground";
// All that the slider can show is asked for at once: moving it needs no call.
const LOWEST_THRESHOLD = 0.05;
const SUGGESTIONS = ["red circle", "blue square", "green star", "yellow ring"]; // what is on the sample
const KEYBOARD_PAUSE_MS = 700; // after the last key on a box, before it is asked for
const MODEL_POLL_MS = 2000;
const MAX_REPEATS = 5; // without being told to

/**
 * @typedef {object} Prompt one question about the picture
 * @property {string} id
 * @property {string|null} text null: only boxes
 * @property {string} label
 * @property {[number, number, number]} colour
 * @property {import("./boxes.js").Box[]} boxes
 * @property {"idle"|"asking"|"done"|"error"} status
 * @property {object[]} instances of its answer, best first
 */

const state = {
  hasFiles: true, // whether the service takes uploads, or reads from its bucket only
  picture: null,
  size: null,
  fileName: "",
  source: null, // promise of what is sent as image_url
  isSample: false,
  /** @type {Prompt[]} */
  prompts: [],
  /** @type {Prompt|null} */
  current: null, // new boxes go to it
  /** @type {Prompt|null} */
  last: null, // whose call and time are shown if none is current
  threshold: 0.5,
  view: "overlay",
  language: "curl",
  asked: 0,
};
let groups = [];
let chosen = 0; // how many pictures were: one that is decoded after a later one was chosen is dropped
const errors = new Map(); // "picture" or a prompt's id → card

const narrow = matchMedia("(max-width: 900px)");
const stage = new Stage(byId("stage"), byId("frame"), byId("photo"), byId("overlay"));
const editor = new BoxEditor(byId("boxes"), { onAdd: addBox, onChange: changeBox, onRemove: removeBox });

// ------------------------------------------------------------------------------------------------------ the picture

/** @param {File|Promise<File>} given */
async function useFile(given, { isSample = false } = {}) {
  const mine = ++chosen;
  const file = await given;
  const picture = await readPicture(file);
  if (mine !== chosen) return picture?.close();
  if (!state.hasFiles) return showUnderneath(picture);
  startOver({ picture, fileName: file.name ?? "pasted.png", isSample });
  if (picture === null) {
    note("Your browser cannot show this kind of picture; the service may read it. Masks are drawn at its size.");
  }
  storePicture(file);
}

function storePicture(file) {
  const ending = /\.[A-Za-z0-9]{1,5}$/.exec(state.fileName)?.[0].toLowerCase() ?? "";
  let repeats = 0;
  const store = () => {
    showError("picture", null);
    const mine = (state.source = api.upload(file, `playground/${newUuid()}${ending}`));
    mine.catch((error) => {
      if (state.source !== mine) return; // another picture is there
      const how = { about: "The picture was not stored", onRetry: again, isRepeatable: repeats < MAX_REPEATS };
      showError("picture", error, how);
    });
    askAll();
  };
  const again = () => {
    repeats++;
    store();
  };
  store();
}

/** The service's own storage has the picture; this browser may read it there, or not. */
async function useAddress(address) {
  const mine = ++chosen;
  startOver({ picture: null, fileName: lastNameOf(address), isSample: false });
  state.source = Promise.resolve(address);
  note(
    "The browser may not read this picture from the bucket, so masks are drawn without it. " +
      "Drop the same picture here to see it underneath; it is not sent anywhere.",
  );
  askAll();
  if (!/^https?:/.test(address)) return;
  const response = await fetch(address, { credentials: "omit" }).catch(() => null);
  const picture = response?.ok ? await readPicture(await response.blob()) : null;
  if (mine !== chosen) picture?.close();
  else if (picture !== null) showUnderneath(picture);
}

/** Without the query: a signature there is nobody's to keep. */
function withoutQuery(address) {
  return address.replace(/[?#].*$/s, "");
}

function lastNameOf(address) {
  const path = withoutQuery(address);
  try {
    return (/^https?:/.test(path) ? decodeURIComponent(path) : path).split("/").pop();
  } catch {
    return path.split("/").pop(); // a % that is one
  }
}

function showUnderneath(picture) {
  if (state.source === null) {
    note("This service reads pictures from its bucket only: give the key or the URL of one first.");
    return;
  }
  state.picture = picture;
  setSize(picture ?? state.size);
  note(null);
}

/** The decoded picture, turned upright, or null if the browser cannot read it. */
async function readPicture(file) {
  return createImageBitmap(file).catch(() => null);
}

function startOver({ picture, fileName, isSample }) {
  state.picture?.close();
  Object.assign(state, { picture, fileName, isSample, size: null, source: null, last: null });
  state.prompts = state.prompts.filter((prompt) => prompt.text !== null);
  for (const prompt of state.prompts) forget(prompt);
  showError("picture", null);
  if (!state.prompts.includes(state.current)) state.current = null;
  note(null);
  setSize(picture);
  byId("stage").dataset.state = picture === null ? "blind" : "shown";
  byId("tools").hidden = false;
  showAll();
  byId("prompt").focus({ preventScroll: true });
}

function forget(prompt) {
  prompt.abort?.abort();
  showError(prompt.id, null);
  Object.assign(prompt, { status: "idle", instances: [], answer: null, boxes: [], repeats: 0 });
}

function setSize(size) {
  state.size = size === null ? null : { width: size.width, height: size.height };
  byId("frame").hidden = state.size === null;
  byId("empty").hidden = true;
  stage.setPicture(state.picture, state.size);
  showBoxes();
}

// ------------------------------------------------------------------------------------------------------ the prompts

function addPrompt(text) {
  const known = state.prompts.find((prompt) => prompt.text === text);
  if (text !== null && known !== undefined) return ask(known);
  const unnamed = state.prompts.filter((prompt) => prompt.text === null).length;
  const prompt = {
    id: newUuid(),
    text,
    label: text ?? (unnamed ? `like this ${unnamed + 1}` : "like this"),
    colour: freeColour(),
    boxes: [],
    status: "idle",
    instances: [],
    answer: null,
    repeats: 0,
  };
  state.prompts.push(prompt);
  if (text !== null) ask(prompt);
  return prompt;
}

function freeColour() {
  const taken = new Set(state.prompts.map((prompt) => cssOf(prompt.colour)));
  let number = 0;
  while (taken.has(cssOf(colourOf(number))) && number < 21) number++;
  return colourOf(number < 21 ? number : state.prompts.length);
}

function removePrompt(prompt) {
  forget(prompt);
  state.prompts = state.prompts.filter((other) => other !== prompt);
  if (state.current === prompt) state.current = null;
  if (state.last === prompt) state.last = state.prompts.findLast((other) => other.answer !== null) ?? null;
  showAll();
  byId("prompt").focus();
}

function addBox(box) {
  const latest = box.label === "negative" ? state.prompts.at(-1) : undefined;
  const prompt = state.current ?? latest ?? addPrompt(null);
  prompt.boxes.push(box);
  state.current = prompt;
  ask(prompt);
  showBoxes();
}

function changeBox(box) {
  const prompt = state.prompts.find((each) => each.boxes.includes(box));
  if (prompt === undefined) return; // taken away during the drag
  showBoxes();
  clearTimeout(prompt.pause);
  prompt.pause = setTimeout(() => ask(prompt), KEYBOARD_PAUSE_MS);
}

function removeBox(box) {
  const prompt = state.prompts.find((each) => each.boxes.includes(box));
  prompt.boxes = prompt.boxes.filter((other) => other !== box);
  if (prompt.text === null && prompt.boxes.length === 0) return removePrompt(prompt);
  ask(prompt);
  showBoxes();
  byId("prompt").focus();
}

// -------------------------------------------------------------------------------------------------------- the calls

function askAll() {
  for (const prompt of state.prompts) ask(prompt);
}

/** Ask the service. `isAgain`: the same question as before, which may have been answered meanwhile. */
async function ask(prompt, { isAgain = false } = {}) {
  clearTimeout(prompt.pause);
  prompt.abort?.abort();
  const { signal } = (prompt.abort = new AbortController());
  if (state.source === null || !state.prompts.includes(prompt)) return showChips();
  prompt.status = "asking";
  showError(prompt.id, null);
  showChips();
  const imageUrl = await state.source.catch(() => null);
  if (signal.aborted) return;
  if (imageUrl === null) {
    prompt.status = "idle"; // the picture's own error is shown
    return showChips();
  }
  if (!isAgain) Object.assign(prompt, { body: bodyOf(prompt, imageUrl), taskId: newUuid(), repeats: 0 });
  try {
    take(prompt, await api.predict({ ...prompt.body, task_id: prompt.taskId }, signal));
  } catch (error) {
    if (!signal.aborted) fail(prompt, error);
  }
}

function bodyOf(prompt, imageUrl) {
  return {
    image_url: imageUrl,
    ...(prompt.text === null ? {} : { text_prompt: prompt.text }),
    ...(prompt.boxes.length ? { boxes: prompt.boxes.map(({ xyxy, label }) => ({ xyxy: [...xyxy], label })) } : {}),
    user_id: USER_ID,
    score_threshold: LOWEST_THRESHOLD,
  };
}

function take(prompt, { answer, roundTripMs }) {
  if (state.size === null) setSize(answer.image_size);
  byId("stage").dataset.state = "shown";
  const { width, height } = answer.image_size;
  if (width !== state.size.width || height !== state.size.height) {
    note(`The picture shown is another one: that in storage has ${width}×${height} pixels.`);
  }
  const first = state.asked;
  state.asked += answer.instances.length;
  const instances = answer.instances.map((instance, index) => ({
    key: `${prompt.id}-${index}`,
    label: prompt.label,
    score: instance.score,
    box: instance.box_xyxy_px,
    areaPx: instance.area_px,
    ends: decodeEnds(instance.mask_rle.counts),
    sizeHw: instance.mask_rle.size,
    promptColour: prompt.colour,
    ownColour: colourOf(first + index),
    told: instance,
  }));
  Object.assign(prompt, { status: "done", answer, instances, roundTripMs });
  state.last = prompt;
  const count = instances.filter((instance) => instance.score > state.threshold).length;
  byId("live").textContent = `${prompt.label}: ${count} found`;
  showAll(instances);
}

function fail(prompt, error) {
  Object.assign(prompt, { status: "error", instances: [], answer: null });
  const isRepeatable = prompt.repeats < MAX_REPEATS;
  const again = () => {
    prompt.repeats++;
    ask(prompt, { isAgain: true });
  };
  showError(prompt.id, error, { about: `“${prompt.label}” was not answered`, onRetry: again, isRepeatable });
  showAll();
}

// --------------------------------------------------------------------------------------------------- what is shown

function showAll(arrived = []) {
  stage.setInstances(allInstances(), arrived);
  showChips();
  showResults();
  showBoxes();
  showCall();
}

function allInstances() {
  return state.prompts.flatMap((prompt) => prompt.instances);
}

function showChips() {
  replaceKeepingFocus(byId("chips"), ...state.prompts.map(chip));
  const left = SUGGESTIONS.filter((text) => !state.prompts.some((prompt) => prompt.text === text));
  byId("suggestions").hidden = !state.isSample || left.length === 0;
  const suggest = (text) => make("button", { type: "button", data: { key: text }, on: { click: () => addPrompt(text) } }, text);
  replaceKeepingFocus(byId("suggestions"), "Try ", ...left.map(suggest));
  byId("prompt").placeholder = state.prompts.length ? "something else" : "What to find, such as red circle";
  showHint();
}

function chip(prompt) {
  const isCurrent = state.current === prompt;
  const select = () => {
    state.current = isCurrent ? null : prompt;
    showChips();
    showBoxes();
    showCall();
    showTime();
  };
  const said = { idle: "waiting", asking: "being asked", done: "answered", error: "failed" }[prompt.status];
  const dot = make("i", { class: "dot" });
  dot.style.background = cssOf(prompt.colour);
  return make(
    "li",
    { class: "chip", data: { label: prompt.label, status: prompt.status } },
    make(
      "button",
      {
        type: "button",
        data: { key: `chip-${prompt.id}` },
        "aria-pressed": String(isCurrent),
        "aria-label": `${prompt.label}, ${said}. Boxes go to the pressed one`,
        on: { click: select },
      },
      dot,
      prompt.label,
    ),
    make(
      "button",
      { class: "remove", type: "button", "aria-label": `Remove ${prompt.label}`, on: { click: () => removePrompt(prompt) } },
      "×",
    ),
  );
}

function showHint() {
  const hint = byId("hint");
  hint.hidden = state.size === null;
  if (state.current !== null) {
    hint.textContent = `Boxes go to “${state.current.label}”. Press it again to begin another.`;
  } else if (matchMedia("(pointer: coarse)").matches) {
    hint.textContent = "Press “Like this”, then drag a box round an example to find all that is like it.";
  } else {
    hint.textContent = "Drag a box round an example to find all that is like it; with Shift, round what is not meant.";
  }
}

function showResults() {
  const answered = state.prompts.filter((prompt) => prompt.answer !== null);
  byId("results").hidden = answered.length === 0;
  groups = answered.map((prompt) => resultGroup(prompt, { size: state.size, onLight: light }));
  replaceKeepingFocus(byId("list"), ...groups.map(({ group }) => group));
  const { min } = byId("threshold");
  byId("ticks").replaceChildren(...allInstances().map((instance) => tick(instance, Number(min), 1)));
  showThreshold();
  showTime();
}

function showThreshold() {
  byId("threshold-value").textContent = state.threshold.toFixed(2);
  byId("count").textContent = String(filterGroups(groups, state.threshold));
  stage.show({ threshold: state.threshold });
}

/** The prompt that the time and the call are of. */
function shownPrompt() {
  return state.current ?? state.last ?? state.prompts.at(-1) ?? null;
}

function showTime() {
  const prompt = shownPrompt();
  byId("timings").hidden = !prompt?.answer;
  if (!prompt?.answer) return;
  byId("timings-total").textContent = `${Math.round(prompt.roundTripMs)} ms`;
  byId("bars").replaceChildren(...timeBars(prompt.answer.timings_ms, prompt.roundTripMs));
}

function showCall() {
  const prompt = shownPrompt();
  byId("call").hidden = prompt === null || prompt.body === undefined;
  if (byId("call").hidden) return;
  byId("code").textContent = snippet(state.language, {
    url: api.urlOf("api/v1/predict"),
    body: { ...prompt.body, score_threshold: state.threshold },
    taskId: newUuid(),
    needsKey: api.hasKey(),
  });
}

function showBoxes() {
  const boxes = state.prompts.flatMap((prompt) =>
    prompt.boxes.map((box, index) => ({
      box,
      key: `box-${prompt.id}-${index}`,
      about: prompt.label,
      isCurrent: state.current === null || state.current === prompt,
      colour: cssOf(prompt.colour),
    })),
  );
  editor.show(state.size, boxes);
}

function showError(about, error, how) {
  errors.get(about)?.stop();
  errors.get(about)?.element.remove();
  errors.delete(about);
  if (error === null) return;
  const card = errorCard(api.asApiError(error), { isRepeatable: false, ...how });
  errors.set(about, card);
  byId("errors").append(card.element);
}

function note(text) {
  byId("note").hidden = text === null;
  byId("note").textContent = text ?? "";
}

/** Make one instance stand out, with its score and size beside it; none: none. */
function light(instance, place = null) {
  stage.show({ lit: instance });
  for (const { rows } of groups) for (const row of rows) row.classList.toggle("lit", row.instance === instance);
  const tip = byId("tip");
  tip.hidden = instance === null;
  if (instance === null) return;
  const isNarrow = narrow.matches;
  tip.textContent = isNarrow ? describeShortly(instance) : describe(instance, state.size);
  const { x, y, isBelow } = isNarrow || place === null ? besideBox(instance.box, isNarrow) : byPointer(place);
  tip.style.left = `${100 * x}%`;
  tip.style.top = `${100 * y}%`;
  tip.style.setProperty("--shift", `${-100 * x}%`); // at the right edge it lies to the left
  tip.classList.toggle("below", isBelow);
}

function byPointer([x, y]) {
  return { x, y, isBelow: y < 0.15 };
}

/** Under the box or over it: the other way where there is no room. */
function besideBox([x0, y0, x1, y1], isUnderFirst) {
  const x = (x0 + x1) / 2 / state.size.width;
  const [top, bottom] = [y0 / state.size.height, y1 / state.size.height];
  const isBelow = isUnderFirst ? bottom < 0.87 : top < 0.15;
  return { x, y: isBelow && isUnderFirst ? bottom : top, isBelow };
}

async function showModel() {
  const line = byId("model");
  try {
    const health = await api.readHealth();
    if (!health.model_loaded) {
      line.textContent = "The model is being loaded…";
      setTimeout(showModel, MODEL_POLL_MS);
      return;
    }
    line.textContent = modelLine(await api.readModel());
  } catch (error) {
    line.textContent = error.status === 401 ? "Ready. What is loaded is told with the key." : error.message;
  }
}

// --------------------------------------------------------------------------------------------------------- the key

function askForKey(reason) {
  const dialog = byId("key-dialog");
  byId("key-reason").textContent = reason;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    const closed = () => {
      byId("key").value = "";
      resolve(dialog.returnValue === "given");
    };
    dialog.addEventListener("close", closed, { once: true });
  });
}

function takeKey(event) {
  event.preventDefault();
  try {
    api.setKey(byId("key").value.trim());
  } catch (error) {
    byId("key-reason").textContent = error.message;
    return;
  }
  byId("key-dialog").close("given");
  byId("key-button").textContent = "API key set";
  showModel();
  showCall();
}

// ------------------------------------------------------------------------------------------------------ listeners

function listenForPictures() {
  const file = byId("file");
  byId("choose").addEventListener("click", () => file.click());
  file.addEventListener("change", () => {
    if (file.files.length) useFile(file.files[0]);
    file.value = ""; // the same one may be chosen again
  });
  const readSample = async () => {
    const blob = await (await fetch("playground/sample.jpg")).blob();
    return new File([blob], "shapes.jpg", { type: blob.type });
  };
  byId("sample").addEventListener("click", () => useFile(readSample(), { isSample: true }));
  byId("another").addEventListener("click", () => {
    byId("stage").dataset.state = "empty";
    byId("empty").hidden = false;
    byId(state.hasFiles ? "choose" : "address").focus();
  });
  byId("remote-source").addEventListener("submit", (event) => {
    event.preventDefault();
    useAddress(byId("address").value.trim());
  });
  const over = (isOver) => byId("stage").classList.toggle("over", isOver);
  addEventListener("dragover", (event) => {
    event.preventDefault();
    over(true);
  });
  addEventListener("dragleave", (event) => event.relatedTarget ?? over(false));
  addEventListener("drop", (event) => {
    event.preventDefault();
    over(false);
    if (event.dataTransfer.files.length) useFile(event.dataTransfer.files[0]);
  });
  addEventListener("paste", (event) => {
    const [pasted] = event.clipboardData.files;
    if (pasted === undefined) return;
    event.preventDefault();
    useFile(pasted);
  });
}

function listenForPrompts() {
  const field = byId("prompt");
  const add = () => {
    const texts = field.value.split(/[,\n]/).map((text) => text.trim()).filter((text) => text !== "");
    field.value = "";
    texts.forEach(addPrompt);
  };
  field.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Enter" || event.key === ",") {
      event.preventDefault();
      add();
    } else if (event.key === "Backspace" && !event.repeat && field.value === "" && state.prompts.length) {
      removePrompt(state.prompts.at(-1));
    }
  });
  field.addEventListener("change", add);
  byId("entry").addEventListener("click", (event) => event.target === byId("entry") && field.focus());
}

function listenForTools() {
  for (const radio of document.querySelectorAll("input[name=view]")) {
    radio.addEventListener("change", () => {
      state.view = radio.value;
      stage.show({ view: state.view });
    });
  }
  byId("threshold").addEventListener("input", (event) => {
    state.threshold = Number(event.target.value);
    showThreshold();
  });
  byId("threshold").addEventListener("change", showCall);
  for (const label of ["positive", "negative"]) {
    byId(`box-${label}`).addEventListener("click", (event) => {
      if (event.detail === 0) editor.addInMiddle(label); // by keyboard
      else setTool(editor.tool === label ? null : label);
    });
  }
  const boxes = byId("boxes");
  const point = (event) => {
    const { left, top, width, height } = boxes.getBoundingClientRect();
    const place = [(event.clientX - left) / width, (event.clientY - top) / height];
    light(event.buttons === 0 ? stage.at(...place) : null, place);
  };
  boxes.addEventListener("pointermove", point);
  boxes.addEventListener("click", point); // a finger does not hover
  boxes.addEventListener("pointerleave", () => light(null));
}

function setTool(tool) {
  editor.tool = tool;
  byId("boxes").classList.toggle("drawing", tool !== null);
  for (const label of ["positive", "negative"]) byId(`box-${label}`).setAttribute("aria-pressed", String(tool === label));
}

function listenForDownloads() {
  const name = (ending) => `${state.fileName.replace(/\.[^.]*$/, "") || "picture"}${ending}`;
  const save = (value, ending) => download(new Blob([JSON.stringify(value)], { type: "application/json" }), name(ending));
  const saveView = async (view) => {
    const how = { view, threshold: state.threshold };
    try {
      download(await drawPng(state.size, state.picture, allInstances(), how), name(`-${view}.png`));
    } catch (error) {
      note(error.message);
    }
  };
  byId("download-view").addEventListener("click", () => saveView(state.view));
  byId("download-mask").addEventListener("click", () => saveView("mask"));
  byId("download-coco").addEventListener("click", () => {
    const kept = ({ instances }) => instances.filter(({ score }) => score > state.threshold).map(({ told }) => told);
    const found = groups.map(({ prompt }) => ({ label: prompt.label, instances: kept(prompt) }));
    save(cocoDocument(state.fileName, state.size, found), ".coco.json");
  });
  byId("download-json").addEventListener("click", () => {
    const told = groups.map(({ prompt: { body, taskId, answer } }) => ({
      request: { ...body, image_url: withoutQuery(body.image_url), task_id: taskId },
      answer,
    }));
    save({ file_name: state.fileName, score_threshold: state.threshold, calls: told }, ".json");
  });
}

function listenForCode() {
  for (const radio of document.querySelectorAll("input[name=language]")) {
    radio.addEventListener("change", () => {
      state.language = radio.value;
      showCall();
    });
  }
  byId("copy").addEventListener("click", async () => {
    await copyText(byId("code").textContent);
    byId("copy").textContent = "Copied";
    setTimeout(() => (byId("copy").textContent = "Copy"), 1500);
  });
}

function listenForKey() {
  api.onUnauthorized(askForKey);
  byId("key-button").addEventListener("click", () => askForKey("It is sent with every call to this service, and to nothing else."));
  byId("key-form").addEventListener("submit", takeKey);
  byId("key-cancel").addEventListener("click", () => byId("key-dialog").close());
}

async function start() {
  showChips();
  listenForKey();
  listenForPictures();
  listenForPrompts();
  listenForTools();
  listenForDownloads();
  listenForCode();
  showModel();
  const served = await api.readDocument().catch(() => null);
  if (served !== null && !("/files/{key}" in served.paths)) {
    state.hasFiles = false;
    byId("local-source").hidden = true;
    byId("remote-source").hidden = false;
  }
  document.documentElement.dataset.ready = "true";
}

start();
