/** Puts the page together, and asks the server now and then how it is. */

import { ApiError, getJson, remember, remembered, useKey } from "./api.js";
import { Chat } from "./chat.js";
import { showMemory } from "./memory.js";
import { RoutingPanel } from "./routing.js";

const POLL_SECONDS = 2;
const MODELS_SECONDS = 30; // the server looks through its folders for them
const MODEL = "llama-moe.model";

const byId = (id) => document.getElementById(id);
const choice = byId("model");
const keyForm = byId("key-form");
const trouble = byId("trouble");

const chosen = () => choice.value;
new Chat(chosen, askForKey);
const routing = new RoutingPanel(chosen);

function askForKey() {
  byId("key-refused").textContent = byId("key").dataset.tried ? "The server does not take this key." : "";
  if (!keyForm.hidden) return;
  keyForm.hidden = false;
  byId("key").focus();
}

let modelsAt = -Infinity;

async function showModels() {
  if (performance.now() < modelsAt + 1000 * MODELS_SECONDS) return;
  const { data } = await getJson("v1/models");
  modelsAt = performance.now();
  const ids = data.map((model) => model.id);
  if (ids.join("\n") === [...choice.options].map((option) => option.value).join("\n")) return;
  const wanted = choice.value || remembered(MODEL);
  choice.replaceChildren(...ids.map((id) => new Option(id, id)));
  if (ids.includes(wanted)) choice.value = wanted;
  choice.disabled = !ids.length;
  routing.restart();
}

async function showState() {
  const report = await getJson("v1/placement");
  const sum = (what) => report.models.reduce((total, model) => total + model.requests[what], 0);
  byId("running").textContent = sum("running");
  byId("waiting").textContent = sum("waiting");
  showRate(sum("generated_tokens"));
  showMemory(byId("memory"), report);
}

let counted = null; // { time, tokens }

function showRate(tokens) {
  const time = performance.now();
  // Fewer than before: a model was unloaded.
  const rate = counted && tokens >= counted.tokens ? (1000 * (tokens - counted.tokens)) / (time - counted.time) : 0;
  byId("rate").textContent = rate.toFixed(rate < 10 ? 1 : 0);
  counted = { time, tokens };
}

async function refresh() {
  let wrong = "";
  try {
    await showModels();
    await showState();
    keyForm.hidden = true;
    if (!choice.options.length) wrong = "The server has no models";
  } catch (error) {
    const answered = error instanceof ApiError;
    wrong = answered ? error.message : "The server cannot be reached";
    if (answered && error.status === 401) {
      wrong = "";
      askForKey();
    }
  }
  if (trouble.textContent !== wrong) trouble.textContent = wrong;
}

async function keepFresh() {
  for (;;) {
    if (!document.hidden && keyForm.hidden) await refresh();
    await new Promise((resolve) => setTimeout(resolve, 1000 * POLL_SECONDS));
  }
}

choice.addEventListener("change", () => {
  remember(MODEL, chosen());
  routing.restart();
});

keyForm.addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(byId("key").value.trim());
  byId("key").value = "";
  byId("key").dataset.tried = "yes";
  keyForm.hidden = true;
  void refresh().then(() => {
    if (keyForm.hidden) byId("prompt").focus();
  });
});

document.addEventListener("visibilitychange", () => {
  modelsAt = -Infinity;
  if (!document.hidden && keyForm.hidden) void refresh();
});

void keepFresh();
