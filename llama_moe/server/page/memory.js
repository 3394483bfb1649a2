/** The memory of each loaded model, by device and role. */

const NAMES = { experts: "Experts", weights: "Other weights", adapters: "LoRA adapters", kv_cache: "KV cache", compute: "Compute buffers", overhead: "Overhead" };
const ORDER = Object.keys(NAMES);
const UNITS = [
  [2 ** 30, "GiB", 2],
  [2 ** 20, "MiB", 1],
  [2 ** 10, "KiB", 1],
];

export function formatSize(bytes) {
  for (const [size, unit, digits] of UNITS) {
    if (bytes >= size) return `${(bytes / size).toFixed(digits)} ${unit}`;
  }
  return `${bytes} B`;
}

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

let shown = "";

/** Shows the models of a report of `/v1/placement`; the page is only touched when something is new. */
export function showMemory(parent, { models, loading }) {
  const text = JSON.stringify([loading, models.map(({ model, experts, memory }) => [model, experts, memory])]);
  if (text === shown) return;
  shown = text;
  const lines = Object.entries(loading).map(([model, share]) => `Loading ${model}: ${Math.round(100 * share)} %`);
  if (!models.length && !lines.length) lines.push("No model is loaded. The first request loads the one that it names.");
  parent.replaceChildren(...lines.map((line) => element("p", { class: "note" }, line)), ...models.map(tableOf));
}

function tableOf({ model, experts, memory }) {
  const devices = new Map();
  for (const row of memory.rows) {
    if (!devices.has(row.device)) devices.set(row.device, []);
    devices.get(row.device).push(row);
  }
  for (const rows of devices.values()) rows.sort((one, other) => ORDER.indexOf(one.role) - ORDER.indexOf(other.role));
  return element(
    "table",
    { class: "memory-of", "data-model": model },
    element("caption", {}, model, element("div", { class: "asked" }, `experts: ${experts}`)),
    element(
      "thead",
      {},
      element("tr", {}, element("th", { scope: "col" }, "Device and role"), element("th", { scope: "col", class: "size" }, "Bytes")),
    ),
    ...[...devices].map(([device, rows]) => bodyOf(device, rows)),
    element("tfoot", {}, lineOf("total", element("th", { scope: "row" }, "Total"), memory.total_bytes)),
  );
}

function bodyOf(device, rows) {
  const total = rows.reduce((sum, row) => sum + row.bytes, 0);
  const bar = element("div", { class: "bar" });
  for (const row of rows) {
    const part = element("span", { "data-role": row.role });
    part.style.width = `${(100 * row.bytes) / Math.max(total, 1)}%`;
    bar.append(part);
  }
  return element(
    "tbody",
    { "data-device": device },
    lineOf("device", element("th", { scope: "rowgroup" }, device), total),
    element("tr", { class: "share", "aria-hidden": "true" }, element("td", { colspan: 2 }, bar)),
    ...rows.map((row) => {
      const swatch = element("span", { class: "swatch", "data-role": row.role, "aria-hidden": "true" });
      return lineOf("role", element("th", { scope: "row" }, swatch, NAMES[row.role] ?? row.role), row.bytes, row.role);
    }),
  );
}

function lineOf(kind, heading, bytes, role) {
  const size = element("td", { class: "size", "data-bytes": bytes }, formatSize(bytes));
  return element("tr", { class: kind, ...(role && { "data-of": role }) }, heading, size);
}
