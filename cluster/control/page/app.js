// The page: asks for the token, asks the control API once a second what is new, and has it drawn.
//
//   api.js      what is asked      picture.js, layout.js   the cluster
//   memory.js   what was told      past.js, charts.js      the charts
//   controls.js what is changed    lists.js                figures, pools, changes, events

import * as api from "./api.js";
import { Charts } from "./charts.js";
import { Controls } from "./controls.js";
import { Lists } from "./lists.js";
import { Memory } from "./memory.js";
import { Past } from "./past.js";
import { Picture } from "./picture.js";

const EVERY_MS = 1000;
const HIDDEN_MS = 10000;
const $ = (id) => document.getElementById(id);

const memory = new Memory();
const past = new Past(memory);
const charts = new Charts($("charts"), past);
const controls = new Controls(memory, { lost, begun: () => ask() });
const picture = new Picture($("picture"), (id) => controls.showWorker(id));
const lists = new Lists(memory, (pool, replicas) => controls.scale(pool, replicas));

let timer = 0;
let asking = null;
let isPaused = false;

function knock(problem = "") {
  clearTimeout(timer);
  $("desk").hidden = true;
  $("door").hidden = false;
  $("door-problem").textContent = problem;
  $("token").value = "";
  $("token").focus();
}

function enter() {
  $("door").hidden = true;
  $("desk").hidden = false;
  ask();
}

function lost(error) {
  api.token.forget();
  knock(error.message);
}

// One question at a time: whoever asks meanwhile waits for the same answer.
function ask() {
  clearTimeout(timer);
  asking ??= look().finally(() => {
    asking = null;
    if (!$("desk").hidden && !isPaused) {
      timer = setTimeout(ask, document.hidden ? HIDDEN_MS : EVERY_MS);
    }
  });
  return asking;
}

async function look() {
  try {
    const told = await api.live(memory.since, memory.eventsAfter);
    if (!api.token.get()) return;
    const hasPoints = memory.take(told);
    draw(hasPoints);
    pulse("live", isPaused ? "paused" : "live");
    // Nobody waits for it: Prometheus may take its time.
    if (past.isDue) lookAtPast();
  } catch (error) {
    if (error instanceof api.WrongToken) lost(error);
    else pulse("silent", "no answer", `${error.message}; trying again.`);
  }
}

async function lookAtPast() {
  const { spanS } = charts;
  past.asking();
  try {
    const told = await api.past(spanS);
    if (spanS !== charts.spanS) return; // asked meanwhile of another
    past.take(told);
    drawPast();
  } catch (error) {
    // First: with the right token it is asked again.
    past.miss();
    if (error instanceof api.WrongToken) lost(error);
  }
}

function drawPast() {
  charts.draw();
  $("source").textContent = past.isThere
    ? "From Prometheus; the newest seconds, which it has not scraped yet, from the cluster itself."
    : `From the cluster's own samples of the last quarter of an hour. ${past.why}.`;
  for (const button of document.querySelectorAll("[data-past]")) button.disabled = !past.isThere;
}

function draw(hasPoints) {
  const { now } = memory;
  document.title = `${now.cluster} – pdcluster`;
  $("cluster-name").textContent = now.cluster;
  $("cluster-what").textContent = now.model;
  lists.draw();
  picture.draw(memory);
  controls.refresh();
  if (hasPoints || !charts.hasDrawn) {
    past.join();
    charts.draw();
  }
  charts.hasDrawn = true;
}

function pulse(state, said, problem = "") {
  $("pulse").dataset.state = isPaused ? "paused" : state;
  if ($("pulse-text").textContent !== said) $("pulse-text").textContent = said;
  $("problem").hidden = !problem;
  $("problem").textContent = problem;
}

function pause() {
  isPaused = !isPaused;
  $("pause").setAttribute("aria-pressed", isPaused);
  $("pause").textContent = isPaused ? "Go on" : "Pause";
  clearTimeout(timer);
  pulse("live", isPaused ? "paused" : "live");
  if (!isPaused) ask();
}

function lookBack(button) {
  if (button.disabled) return;
  for (const one of document.querySelectorAll("[data-span]")) {
    one.setAttribute("aria-pressed", one === button);
  }
  charts.spanS = Number(button.dataset.span);
  charts.draw();
  lookAtPast();
}

const KEYS = {
  c: () => picture.focus(),
  p: () => $("pools").querySelector("button:enabled")?.focus(),
  h: () => $("changes-title").focus(),
  e: () => $("events").focus(),
  g: () => $("charts-title").focus(),
  1: () => lookBack(document.querySelector('[data-span="120"]')),
  2: () => lookBack(document.querySelector('[data-span="300"]')),
  3: () => lookBack(document.querySelector('[data-span="900"]')),
  4: () => lookBack(document.querySelector('[data-span="3600"]')),
  5: () => lookBack(document.querySelector('[data-span="21600"]')),
  6: () => lookBack(document.querySelector('[data-span="86400"]')),
  " ": pause,
  "?": () => $("keys").showModal(),
};

document.addEventListener("keydown", (event) => {
  const isTyping = event.target.closest("input, dialog");
  const isPressing = event.key === " " && event.target.closest("button, a");
  if (isTyping || isPressing || $("desk").hidden) return;
  if (event.ctrlKey || event.metaKey || event.altKey || !KEYS[event.key]) return;
  event.preventDefault();
  KEYS[event.key]();
});

$("door-form").addEventListener("submit", (event) => {
  event.preventDefault();
  api.token.keep($("token").value.trim());
  enter();
});
$("forget").addEventListener("click", () => {
  api.token.forget();
  location.reload();
});
$("pause").addEventListener("click", pause);
$("keys-open").addEventListener("click", () => $("keys").showModal());
for (const button of document.querySelectorAll("[data-span]")) {
  button.addEventListener("click", () => lookBack(button));
}
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && !$("desk").hidden && !isPaused) ask();
});

if (api.token.get()) enter();
else knock();
