/* One run: a card that fills while the stream of its request comes. */

const DONE = "[DONE]";

/* An error with words for a person; `status` is that of the response, if there was one. */
export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/* Sends a request; every failure becomes a ServerError, but for an abort. */
export async function call(path, key, options = {}) {
  const headers = { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let reply;
  try {
    reply = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(`The server does not answer. Does it run at ${location.origin}?`);
  }
  if (reply.ok) return reply;
  const body = await reply.json().catch(() => ({}));
  throw new ServerError(body.error?.message ?? `The server answered with status ${reply.status}.`, reply.status);
}

/* The JSON objects of a stream of events. */
async function* eventsOf(reply) {
  const reader = reply.body.getReader();
  const decoder = new TextDecoder();
  for (let rest = ""; ;) {
    const { done, value } = await reader.read().catch(error => {
      if (error.name === "AbortError") throw error;
      throw new ServerError("The connection to the server was lost.");
    });
    if (done) throw new ServerError("The stream ended early.");
    const events = (rest + decoder.decode(value, { stream: true })).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.slice("data: ".length);
      if (data === DONE) return;
      yield JSON.parse(data);
    }
  }
}

export class Run {
  /* budget: of the thinking; null: none was set. body: of the request. */
  constructor(budget, body, { key, title, onCode, onKeep }) {
    Object.assign(this, { budget, body, key, tokens: 0, controller: new AbortController() });
    this.card = document.createElement("article");
    this.card.ariaBusy = "true";
    this.card.innerHTML = `
      <h2><span></span><button class="quiet small" type="button" hidden>Answer now</button></h2>
      <div class="bar" hidden><i></i></div>
      <pre class="thinking" tabindex="0" aria-label="Thinking"></pre>
      <pre class="answer" tabindex="0" aria-label="Answer"></pre>
      <p class="facts"></p>
      <div class="row">
        <button class="quiet small" type="button" data-code="curl">curl</button>
        <button class="quiet small" type="button" data-code="Python">Python</button>
        <label class="keep" hidden><input type="radio"> continue with this answer</label>
      </div>`;
    const find = selector => this.card.querySelector(selector);
    [this.endNow, this.bar, this.thinking] = [find("h2 button"), find(".bar"), find(".thinking")];
    [this.answer, this.facts, this.keep] = [find(".answer"), find(".facts"), find(".keep")];
    find("h2 span").textContent = title;
    this.endNow.onclick = () => this.endThinking();
    this.keep.onchange = () => onKeep(this);
    for (const button of this.card.querySelectorAll("[data-code]"))
      button.onclick = () => onCode(button.dataset.code, this.body);
  }

  get text() { return this.answer.textContent; }
  get failed() { return this.facts.classList.contains("error"); }
  stop() { this.controller.abort(); }

  async start() {
    this.begin = performance.now();
    try {
      const options = { method: "POST", body: JSON.stringify(this.body), signal: this.controller.signal };
      const reply = await call("v1/chat/completions", this.key, options);
      for await (const chunk of eventsOf(reply)) this.add(chunk);
    } catch (error) {
      if (error.name === "AbortError") this.facts.textContent = `stopped \u00b7 ${this.facts.textContent}`;
      else this.fail(error);
    }
    this.endNow.hidden = true;
    this.card.ariaBusy = "false";
    this.card.dataset.done = "1";
  }

  fail(error) {
    this.error = error;
    this.facts.textContent = error.message;
    this.facts.classList.add("error");
  }

  async endThinking() {
    this.endNow.disabled = true;
    try {
      await call(`v1/requests/${this.id}/end_thinking`, this.key, { method: "POST" });
    } catch (error) {
      if (error.status !== 404) this.fail(error);  /* 404: it has just ended by itself */
    }
  }

  add(chunk) {
    if (chunk.error) throw new ServerError(chunk.error.message);
    this.id = chunk.id;
    if (chunk.checkpoint) this.addCheckpoint(chunk.checkpoint);
    for (const { delta, forced } of chunk.choices) {
      this.tokens += forced.length;
      /* A wait text comes alone; a forced end follows a sampled token, and its text is an answer. */
      if (delta.reasoning) this.addText(this.thinking, delta.reasoning, forced.every(Boolean));
      if (delta.content) this.addText(this.answer, delta.content, forced.some(Boolean));
      this.endNow.hidden = !delta.reasoning && this.endNow.hidden || Boolean(this.text);
    }
    this.showProgress();
    if (chunk.usage) this.finish(chunk.usage);
  }

  addText(pre, text, forced) {
    const atEnd = pre.scrollTop + pre.clientHeight >= pre.scrollHeight - 4;  /* else somebody reads */
    const node = document.createElement(forced ? "mark" : "span");
    node.textContent = text;
    pre.append(node);
    if (atEnd) pre.scrollTop = pre.scrollHeight;
  }

  /* Places the answer of a checkpoint behind the last character of the thinking that it saw. */
  addCheckpoint({ budget, text, reasoning_chars: count }) {
    const flag = document.createElement("span");
    flag.className = "checkpoint";
    flag.textContent = ` \u2691${budget}: ${text.replace(/\s+/g, " ").trim()} `;
    flag.title = `the answer with a budget of ${budget} thinking tokens`;
    let left = count;  /* code points, as the server counts */
    for (const span of this.thinking.children) {
      if (span.className === "checkpoint") continue;
      const chars = [...span.textContent];
      if (left < chars.length || !left) {
        const rest = span.cloneNode();
        rest.textContent = chars.slice(left).join("");
        span.textContent = chars.slice(0, left).join("");
        span.after(flag, rest);
        return;
      }
      left -= chars.length;
    }
    this.thinking.append(flag);
  }

  showProgress() {
    const seconds = (performance.now() - this.begin) / 1000;
    this.facts.textContent = `${this.tokens} tokens, ${Math.round(this.tokens / seconds)} tokens/s`;
    if (this.budget) this.fill(this.tokens / this.budget);
  }

  fill(share) {
    this.bar.hidden = false;
    this.bar.firstElementChild.style.width = `${Math.min(100, 100 * share)}%`;
  }

  finish(usage) {
    const { tokens, waits_used: waits, end_reason: reason, budget } = usage.thinking;
    if (budget === null && !tokens) return;  /* it did not think */
    const limit = budget === null ? "" : ` of ${budget}`;
    this.facts.textContent =
      `thought ${tokens}${limit} tokens, ended: ${reason}, waits: ${waits} \u00b7 ${this.facts.textContent}`;
    if (budget) this.fill(tokens / budget);
  }
}
