/** Text that comes in pieces, shown as it is, with what is between ``` lines as code. Nothing in it is ever read as HTML. */

const MAYBE_FENCE = /^ {0,3}`{0,2}$/;
const FENCE = /^ {0,3}(`{3,})([^`]*)$/;
const FENCE_BEGIN = /^ {0,3}`{3,}/;

export class MessageText {
  #parent;
  #node = null; // the text node that grows
  #held = ""; // the beginning of a line that may be a fence
  #atLineStart = true;
  #fence = ""; // the one that opened the code

  constructor(parent) {
    this.#parent = parent;
  }

  append(text) {
    let rest = this.#held + text;
    this.#held = "";
    while (rest) {
      const end = rest.indexOf("\n");
      if (this.#atLineStart) {
        if (end < 0 && (MAYBE_FENCE.test(rest) || FENCE_BEGIN.test(rest))) {
          this.#held = rest;
          return;
        }
        if (end >= 0 && this.#isFence(rest.slice(0, end))) {
          rest = rest.slice(end + 1);
          continue;
        }
      }
      const piece = end < 0 ? rest : rest.slice(0, end + 1);
      this.#write(piece);
      this.#atLineStart = end >= 0;
      rest = rest.slice(piece.length);
    }
  }

  /** No more comes. */
  finish() {
    if (this.#held && !this.#isFence(this.#held)) this.#write(this.#held);
    this.#held = "";
  }

  /** Begins or ends code if the line does that. */
  #isFence(line) {
    const match = FENCE.exec(line.trimEnd());
    if (!match) return false;
    if (!this.#fence) {
      this.#fence = match[1];
    } else if (match[1].length >= this.#fence.length && !match[2]) {
      this.#fence = "";
    } else {
      return false;
    }
    this.#node = null;
    return true;
  }

  #write(text) {
    if (!this.#node) {
      // Empty lines around code are its margin.
      const previous = this.#parent.lastElementChild;
      if (previous && !this.#fence) {
        text = text.replace(/^\n+/, "");
        if (!text) return;
      } else if (previous) {
        previous.textContent = previous.textContent.trimEnd();
      }
      this.#node = document.createTextNode("");
      const element = document.createElement(this.#fence ? "code" : "div");
      element.append(this.#node);
      if (this.#fence) {
        const block = document.createElement("pre");
        block.tabIndex = 0; // long lines are scrolled by keys too
        block.append(element);
        this.#parent.append(block);
      } else {
        element.className = "text";
        this.#parent.append(element);
      }
    }
    this.#node.appendData(text);
  }
}
