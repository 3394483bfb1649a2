/** The conversation: what was said, asking for the next answer, stopping it. */

import { ApiError, events, remember, remembered } from "./api.js";
import { MessageText } from "./text.js";

const HISTORY = "llama-moe.history";
const OPTIONS = "llama-moe.options";

const byId = (id) => document.getElementById(id);

export class Chat {
  #log = byId("log");
  #empty = byId("empty");
  #state = byId("chat-state");
  #prompt = byId("prompt");
  #send = byId("send");
  #stop = byId("stop");
  #options = ["system", "temperature", "max-tokens"].map(byId);
  #messages = [];
  #running = null; // an AbortController
  #following = true; // the end of the conversation is shown, unless somebody scrolled up to read
  #model;
  #onRefused;

  /**
   * @param model gives the id of the chosen model
   * @param onRefused called when the server wants an API key
   */
  constructor(model, onRefused) {
    this.#model = model;
    this.#onRefused = onRefused;
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      void this.#ask();
    });
    this.#prompt.addEventListener("keydown", (event) => {
      // A key that ends the input of a composed character sends nothing.
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        void this.#ask();
      }
    });
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.stop();
    });
    this.#stop.addEventListener("click", () => this.stop());
    byId("new-chat").addEventListener("click", () => this.#clear());
    for (const field of this.#options) field.addEventListener("change", () => this.#saveOptions());
    this.#log.addEventListener("scroll", () => (this.#following = this.#atEnd()));
    new ResizeObserver(() => this.#following && this.#scrollToEnd()).observe(this.#log);
    this.#restore();
  }

  stop() {
    this.#running?.abort();
  }

  async #ask() {
    const text = this.#prompt.value;
    if (this.#running || !text.trim() || !this.#model()) return;
    const wrong = this.#options.find((field) => !field.checkValidity());
    if (wrong) {
      byId("options").open = true;
      wrong.reportValidity();
      return;
    }
    const user = { role: "user", content: text };
    this.#show(user, true);
    this.#prompt.value = "";
    const answer = { role: "assistant", model: this.#model(), content: "", reasoning: "" };
    const view = this.#show(answer, true);
    const failure = await this.#answer([...this.#messages, user], answer, view);
    if (answer.content || !failure) {
      this.#messages.push(user, answer);
      remember(HISTORY, JSON.stringify(this.#messages));
    } else if (!this.#prompt.value) {
      this.#prompt.value = text; // to try again
    }
    if (failure instanceof ApiError && failure.status === 401) this.#onRefused();
  }

  /** Streams an answer into a view. Returns what went wrong. */
  async #answer(messages, answer, view) {
    const running = new AbortController();
    this.#running = running;
    this.#setBusy(true);
    const timing = { first: 0, last: 0 };
    let finish = null;
    let usage = null;
    try {
      for await (const data of events("v1/chat/completions", { body: this.#request(messages), signal: running.signal })) {
        if (data === "[DONE]") break;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Error(chunk.error.message);
        usage = chunk.usage ?? usage;
        const choice = chunk.choices?.[0];
        if (!choice) continue;
        finish = choice.finish_reason ?? finish;
        const thought = choice.delta.reasoning_content ?? "";
        const text = choice.delta.content ?? "";
        if (!thought && !text) continue;
        timing.last = performance.now();
        timing.first ||= timing.last;
        answer.reasoning += thought;
        answer.content += text;
        view.append(text, thought);
        if (this.#following) this.#scrollToEnd();
      }
      view.finish(outcome(finish, usage, timing));
      this.#say("The answer is complete.");
      return null;
    } catch (error) {
      if (running.signal.aborted) {
        view.finish("stopped");
        this.#say("Stopped.");
        return null;
      }
      view.fail(error instanceof TypeError ? `The server cannot be reached: ${error.message}` : error.message);
      this.#say("The answer failed.");
      return error;
    } finally {
      this.#running = null;
      this.#setBusy(false);
      if (this.#following) this.#scrollToEnd();
    }
  }

  #request(messages) {
    const [system, temperature, maxTokens] = this.#options.map((field) => field.value.trim());
    const said = messages.filter((message) => message.content).map(({ role, content }) => ({ role, content }));
    return {
      model: this.#model(),
      messages: system ? [{ role: "system", content: system }, ...said] : said,
      stream: true,
      stream_options: { include_usage: true },
      ...(temperature && { temperature: Number(temperature) }),
      ...(maxTokens && { max_tokens: Number(maxTokens) }),
    };
  }

  #setBusy(busy) {
    // The one that had the focus is about to go.
    const focused = document.activeElement === this.#stop || document.activeElement === this.#send;
    this.#send.hidden = busy;
    this.#stop.hidden = !busy;
    if (focused) (busy ? this.#stop : this.#prompt).focus();
    if (busy) this.#say("Answering.");
  }

  #say(text) {
    this.#state.textContent = text;
  }

  #show(message, running = false) {
    this.#empty.hidden = true;
    const view = new MessageView(message, running && message.role === "assistant");
    this.#log.append(view.element);
    if (message.content || message.reasoning) view.append(message.content, message.reasoning ?? "");
    if (!running || message.role === "user") view.finish("");
    this.#scrollToEnd();
    return view;
  }

  #clear() {
    this.stop();
    this.#messages = [];
    remember(HISTORY, "[]");
    for (const element of this.#log.querySelectorAll(".message")) element.remove();
    this.#empty.hidden = false;
    this.#prompt.focus();
  }

  #restore() {
    const options = parsed(remembered(OPTIONS)) ?? [];
    this.#options.forEach((field, index) => (field.value = options[index] ?? ""));
    this.#messages = parsed(remembered(HISTORY)) ?? [];
    for (const message of this.#messages) this.#show(message);
  }

  #saveOptions() {
    remember(OPTIONS, JSON.stringify(this.#options.map((field) => field.value)));
  }

  #atEnd() {
    return this.#log.scrollHeight - this.#log.scrollTop - this.#log.clientHeight < 40;
  }

  #scrollToEnd() {
    this.#log.scrollTop = this.#log.scrollHeight;
  }
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

function outcome(finish, usage, timing) {
  const parts = [];
  if (usage) {
    const count = usage.completion_tokens;
    parts.push(`${count} ${count === 1 ? "token" : "tokens"}`);
    const seconds = (timing.last - timing.first) / 1000;
    if (count > 1 && seconds > 0) parts.push(`${((count - 1) / seconds).toFixed(1)} tokens/s`);
  }
  if (finish === "length") parts.push("ended by the limit of tokens");
  return parts.join(", ");
}

class MessageView {
  #body;
  #text;
  #thinking = null;

  constructor({ role, model }, busy) {
    this.element = document.createElement("article");
    this.element.className = `message ${role}`;
    this.element.setAttribute("aria-busy", String(busy));
    const name = document.createElement("h3");
    name.textContent = role === "user" ? "You" : model;
    this.#body = document.createElement("div");
    this.#body.className = "body";
    this.element.append(name, this.#body);
    this.#text = new MessageText(this.#body);
  }

  append(text, thought) {
    if (thought) {
      if (!this.#thinking) this.#beginThinking();
      this.#thinking.append(thought);
    }
    if (text) this.#text.append(text);
  }

  finish(outcome) {
    this.#text.finish();
    this.#thinking?.finish();
    this.element.setAttribute("aria-busy", "false");
    if (outcome) this.#note("outcome", outcome);
  }

  fail(message) {
    this.finish("");
    this.#note("failure", message).setAttribute("role", "alert");
  }

  #beginThinking() {
    const details = document.createElement("details");
    const summary = document.createElement("summary");
    summary.textContent = "Thinking";
    const block = document.createElement("div");
    block.className = "thinking";
    details.append(summary, block);
    this.#body.before(details);
    this.#thinking = new MessageText(block);
  }

  #note(kind, text) {
    const note = document.createElement("p");
    note.className = kind;
    note.textContent = text;
    this.element.append(note);
    return note;
  }
}
