/** What the panel shows of answers: the list of instances, the scores on the slider, the time, the model. */
import { cssOf } from "./palette.js";
import { make, milliseconds } from "./dom.js";

const STAGES = { download: "fetch", decode: "decode", queue: "queue", infer: "model", encode: "masks", upload: "store", row_update: "row" };

/** How much of the picture, in words: "12.3 %". */
export function shareOf(areaPx, size) {
  const percent = (100 * areaPx) / (size.width * size.height);
  return `${percent >= 10 ? percent.toFixed(0) : percent.toFixed(percent >= 0.1 ? 1 : 2)} %`;
}

/** An instance in one line. */
export function describe({ score, areaPx, box, label }, size) {
  const [x0, y0, x1, y1] = box.map(Math.round);
  return `${label} ${score.toFixed(2)} · ${x1 - x0}×${y1 - y0} px · ${areaPx.toLocaleString("en")} px (${shareOf(areaPx, size)})`;
}

/** Where there is little room: the picture shows which one it is. */
export function describeShortly({ score, box }) {
  const [x0, y0, x1, y1] = box.map(Math.round);
  return `${score.toFixed(2)} · ${x1 - x0}×${y1 - y0}`;
}

/**
 * One prompt's part of the list.
 *
 * @param {object} prompt with an answer
 * @param {object} how
 * @param {(instance: object|null) => void} how.onLight
 */
export function resultGroup(prompt, { size, onLight }) {
  const rows = prompt.instances.map((instance, index) => resultRow(instance, index, { size, onLight }));
  const list = make(
    "ul",
    { role: "listbox", "aria-label": `Instances of ${prompt.label}`, on: { keydown: (event) => rove(event, rows) } },
    ...rows,
  );
  const dot = make("i", { class: "dot" });
  dot.style.background = cssOf(prompt.colour);
  const none = make("p", { class: "none" });
  const group = make("section", { class: "found" }, make("h3", {}, dot, prompt.label, make("span", { class: "count" })), list, none);
  return { group, rows, none, prompt };
}

function resultRow(instance, index, { size, onLight }) {
  const bar = make("i", { class: "bar" });
  bar.style.width = `${100 * instance.score}%`;
  bar.style.background = cssOf(instance.promptColour);
  const [x0, y0, x1, y1] = instance.box.map(Math.round);
  const row = make(
    "li",
    {
      role: "option",
      tabindex: index === 0 ? "0" : "-1",
      "aria-selected": "false",
      "aria-label": describe(instance, size),
      data: { key: instance.key },
      on: {
        focus: () => light(row, true),
        blur: () => light(row, false),
        pointerenter: () => light(row, true),
        pointerleave: () => light(row, false),
      },
    },
    make("span", { class: "score" }, instance.score.toFixed(2)),
    make("span", { class: "track" }, bar),
    make("span", { class: "size" }, `${x1 - x0}×${y1 - y0}`),
    make("span", { class: "share" }, shareOf(instance.areaPx, size)),
  );
  row.instance = instance;
  const light = (element, isLit) => {
    element.setAttribute("aria-selected", String(isLit));
    onLight(isLit ? instance : null);
  };
  return row;
}

/** Arrow keys go from one row to the next that is shown. */
function rove(event, rows) {
  const shown = rows.filter((row) => !row.hidden);
  const at = shown.indexOf(document.activeElement);
  const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: shown.length - 1 }[event.key];
  if (to === undefined || shown[to] === undefined) return;
  event.preventDefault();
  for (const row of rows) row.tabIndex = row === shown[to] ? 0 : -1;
  shown[to].focus();
}

/** Hide what is not above the threshold, in every group; returns how many are left. */
export function filterGroups(groups, threshold) {
  let all = 0;
  for (const { group, rows, none, prompt } of groups) {
    let count = 0;
    for (const row of rows) {
      row.hidden = !(row.instance.score > threshold);
      if (!row.hidden) count++;
    }
    const first = rows.find((row) => !row.hidden);
    if (first && !rows.some((row) => row.tabIndex === 0 && !row.hidden)) first.tabIndex = 0;
    group.querySelector(".count").textContent = String(count);
    none.hidden = count > 0;
    none.textContent = rows.length ? `Nothing above ${threshold.toFixed(2)}: the best has ${prompt.instances[0].score.toFixed(2)}.` : "Nothing found.";
    all += count;
  }
  return all;
}

/** A mark for every score along the slider. */
export function tick(instance, min, max) {
  const mark = make("i", {});
  mark.style.setProperty("--at", String((instance.score - min) / (max - min)));
  mark.style.background = cssOf(instance.promptColour);
  return mark;
}

/** The stages as bars, each beginning where the ones before it would end. */
export function timeBars(timings, roundTripMs) {
  const stages = Object.entries(STAGES).filter(([stage]) => timings[stage] !== undefined);
  const longest = Math.max(...stages.map(([stage]) => timings[stage]), 1e-3);
  const rows = stages.map(([stage, name]) => timeRow(name, timings[stage], timings[stage] / longest, stage));
  const rest = Math.max(0, roundTripMs - timings.total);
  return [...rows, timeRow("network, page", rest, rest / Math.max(longest, rest), "network")];
}

function timeRow(name, ms, share, stage) {
  const bar = make("i", { class: "bar" });
  bar.style.width = `${100 * share}%`;
  return make(
    "p",
    { data: { stage } },
    make("span", { class: "name" }, name),
    make("span", { class: "track" }, bar),
    make("span", { class: "ms" }, `${milliseconds(ms)} ms`),
  );
}

/** What is loaded, in one line. */
export function modelLine(model) {
  const millions = model.parameters / 1e6;
  const count = `${millions < 10 ? millions.toFixed(1) : Math.round(millions)} M parameters`;
  return `${model.model_name} · ${model.model_version} · ${count} · ${model.device} ${model.dtype}`;
}
