/** The live counts of the chosen experts: asked for while the panel is open and the tab is seen, since counting costs speed. */

import { ApiError, events } from "./api.js";
import { Heatmap } from "./heatmap.js";
import { element } from "./memory.js";

const RECENT_SECONDS = 10;
const RETRY_SECONDS = 3;
const MOST_USED = 3;

const byId = (id) => document.getElementById(id);

export class RoutingPanel {
  #panel = byId("routing");
  #note = byId("routing-note");
  #view = byId("routing-view");
  #span = byId("routing-span");
  #heatmap = new Heatmap(byId("heat"), byId("heat-readout"), byId("heat-spoken"));
  #model;
  #running = null; // an AbortController
  #history = []; // { time, report }, the oldest first
  #timer = 0;

  /** @param model gives the id of the chosen model */
  constructor(model) {
    this.#model = model;
    this.#panel.addEventListener("toggle", () => this.restart());
    this.#span.addEventListener("change", () => this.#draw());
    document.addEventListener("visibilitychange", () => this.restart());
  }

  /** Begins to listen, or ends it, as the panel and the tab are. */
  restart() {
    this.#running?.abort();
    this.#running = null;
    clearInterval(this.#timer);
    if (!this.#panel.open || document.hidden || !this.#model()) return;
    this.#history = [];
    this.#running = new AbortController();
    // What is recent changes also when nothing is computed, and so nothing is reported.
    this.#timer = setInterval(() => this.#span.value === "recent" && this.#draw(), 1000);
    void this.#listen(this.#model(), this.#running.signal);
  }

  async #listen(model, signal) {
    while (!signal.aborted) {
      try {
        for await (const data of events(`v1/routing/stream?model=${encodeURIComponent(model)}`, { signal })) this.#onReport(JSON.parse(data));
      } catch (error) {
        if (signal.aborted) return;
        this.#say(error instanceof ApiError ? error.message : "The server cannot be reached.");
        if (error instanceof ApiError && error.status < 500) return;
      }
      await new Promise((resolve) => setTimeout(resolve, 1000 * RETRY_SECONDS));
    }
  }

  #onReport({ models: [report] }) {
    if (!report.tracing) {
      this.#view.hidden = true;
      this.#history = [];
      this.#say(report.loaded ? "This model has no experts." : "This model is not loaded. Counting begins when it is.");
      return;
    }
    const newest = this.#history.at(-1);
    if (newest && report.tokens < newest.report.tokens) this.#history = []; // loaded again
    this.#history.push({ time: performance.now(), report });
    this.#say(`Counting. ${report.experts_used} of ${report.expert_count} experts compute each token of a layer.`);
    this.#view.hidden = false;
    this.#draw();
  }

  #draw() {
    const newest = this.#history.at(-1)?.report;
    if (!newest) return;
    const begin = performance.now() - 1000 * RECENT_SECONDS;
    while (this.#history.length > 1 && this.#history[1].time <= begin) this.#history.shift();
    const before = this.#span.value === "recent" ? this.#history[0].report : null;
    const tokens = newest.tokens - (before?.tokens ?? 0);
    const layers = newest.layers.map(({ layer, counts }, row) => ({
      layer,
      counts: before ? counts.map((count, expert) => count - before.layers[row].counts[expert]) : counts,
    }));
    this.#heatmap.show(layers);
    byId("routing-tokens").textContent = `${tokens.toLocaleString("en")} ${tokens === 1 ? "token" : "tokens"}`;
    byId("layer-first").textContent = layers[0].layer;
    byId("layer-last").textContent = layers.at(-1).layer;
    byId("expert-last").textContent = newest.expert_count - 1;
    byId("scale-most").textContent = this.#heatmap.drawScale(byId("heat-scale")).toFixed(1);
    byId("heat-table").replaceChildren(...layers.map((layer) => rowOf(layer)));
  }

  #say(text) {
    if (this.#note.textContent !== text) this.#note.textContent = text;
  }
}

function rowOf({ layer, counts }) {
  const total = counts.reduce((sum, count) => sum + count, 0);
  const order = counts.map((_, expert) => expert).filter((expert) => counts[expert] > 0);
  order.sort((one, other) => counts[other] - counts[one] || one - other);
  const most = order.slice(0, MOST_USED).map((expert) => `${expert} (${((counts[expert] * counts.length) / total).toFixed(2)})`);
  return element(
    "tr",
    { "data-layer": layer },
    element("th", { scope: "row" }, String(layer)),
    element("td", {}, most.join(", ") || "none yet"),
    element("td", {}, String(counts.length - order.length)),
  );
}
