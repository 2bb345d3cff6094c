/* The browser of prompts. Texts are only ever put into the page as text; a page of rows at a time is in the document. */
(() => {
  const ROWS = 20;       // in the document at a time
  const LONG = 3000;     // characters of a text that are shown at first
  const SNIPPET = 160;
  const CONTROLS = /[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\u200b\u202a-\u202e\u2066-\u2069\ufeff]/g;
  const OUTCOMES = { "": "any", right: "policy right", wrong: "policy wrong", gained: "became right", lost: "became wrong" };
  const DERIVED = {
    chosen_change: n => n.policy_chosen - n.ref_chosen,
    rejected_change: n => n.policy_rejected - n.ref_rejected,
    policy_margin: n => n.policy_chosen - n.policy_rejected,
    ref_margin: n => n.ref_chosen - n.ref_rejected,
  };
  const NAMES = {
    chosen_change: "change of log-prob, chosen", rejected_change: "change of log-prob, rejected",
    policy_margin: "policy: chosen − rejected", ref_margin: "reference: chosen − rejected", ln_ches: "LN-CHES",
    ches: "CHES", difficulty: "difficulty c", length_chosen: "tokens, chosen", length_rejected: "tokens, rejected",
    last_hidden: "last hidden states", edit_similarity: "edit similarity", tokens: "tokens of an answer",
  };
  const id = name => document.getElementById(name);
  const data = JSON.parse(id("prompt-data").textContent);
  const prompts = data.prompts;
  const byKey = new Map(prompts.map((prompt, i) => [prompt.key, i]));
  prompts.forEach((prompt, i) => {
    prompt.order = i;
    for (const pair of prompt.pairs) {
      for (const at of pair.at) {
        for (const [name, of] of Object.entries(DERIVED)) {
          const value = of(at.numbers);
          if (Number.isFinite(value)) at.numbers[name] = value;
        }
      }
    }
  });
  const steps = [...new Set(prompts.flatMap(p => [...p.pairs.flatMap(q => q.at.map(a => a.step)), ...p.answers.map(a => a.step)]))]
    .sort((a, b) => a - b);
  const pairNumbers = named(p => p.pairs.flatMap(q => q.at.map(a => a.numbers)));
  const scores = named(p => p.answers.map(a => a.scores));
  const state = { open: -1, page: 0, found: [] };

  function named(of) {
    const names = new Set();
    for (const prompt of prompts) for (const each of of(prompt)) for (const name in each) names.add(name);
    return [...names].sort();
  }

  function make(tag, properties, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(properties || {})) {
      if (name === "class") made.className = value;
      else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else if (value !== false) made.setAttribute(name, value === true ? "" : value);
    }
    made.append(...children.filter(child => child !== null && child !== ""));
    return made;
  }

  const show = value => {
    if (!Number.isFinite(value)) return "—";
    const text = Math.abs(value) >= 1e4 ? Math.round(value).toLocaleString("en").replace(/,/g, "\u202f") : String(+value.toPrecision(4));
    return text.replace("-", "−");
  };
  const counted = n => n.toLocaleString("en").replace(/,/g, "\u202f");

  /* ---- what is asked for ---- */

  function options(select, entries) {
    select.replaceChildren(...entries.map(([value, text]) => {
      const option = make("option", { value });
      option.textContent = visible(text);
      return option;
    }));
  }

  function offered() {
    const numbers = [...pairNumbers.map(n => [`n:${n}`, NAMES[n] || n.replace(/_/g, " ")]), ...scores.map(n => [`s:${n}`, n])];
    if (prompts.some(p => p.answers.length)) numbers.push(["t:tokens", NAMES.tokens]);
    options(id("f-set"), [["", "all"], ...data.sets.map((name, i) => [i, name])]);
    options(id("f-model"), [["", "any"], ...data.models.map((name, i) => [i, name])]);
    options(id("f-step"), [["last", "last of each"], ["", "all"], ...steps.map(s => [s, `step ${s}`])]);
    options(id("f-end"), [["", "any"], ...[...new Set(prompts.flatMap(p => p.answers.map(a => a.end)))].sort().map(e => [e, e])]);
    options(id("f-outcome"), Object.entries(OUTCOMES));
    options(id("f-number"), [["", "any"], ...numbers]);
    options(id("f-sort"), [["", "order of the data"], ["prompt", "length of the prompt"], ...numbers]);
    const hide = (name, unless) => { id(name).closest("label").hidden = unless; };
    hide("f-set", data.sets.length < 2);
    hide("f-model", data.models.length < 2);
    hide("f-step", steps.length < 2);
    hide("f-end", id("f-end").options.length < 3);
    hide("f-outcome", !pairNumbers.includes("policy_margin"));
    hide("f-number", !numbers.length);
  }

  function wanted() {
    const number = name => (id(name).value === "" ? null : Number(id(name).value));
    const index = name => (id(name).value === "" ? null : Number(id(name).value));
    return {
      words: [...id("f-text").value.toLowerCase().matchAll(/["“”]([^"“”]+)["“”]?|(\S+)/g)].map(m => m[1] || m[2]).filter(w => !/^["“”]+$/.test(w)),
      set: index("f-set"), model: index("f-model"), step: id("f-step").value, end: id("f-end").value,
      outcome: id("f-outcome").value, number: id("f-number").value, low: number("f-low"), high: number("f-high"),
      short: number("f-short"), long: number("f-long"), sort: id("f-sort").value, order: Number(id("f-order").value),
    };
  }

  /** Those of an evaluation step, or of the last step of each model or run. */
  function atStep(entries, whose, step) {
    if (step === "") return entries;
    if (step !== "last") return entries.filter(each => each.step === Number(step));
    const last = new Map();
    for (const each of entries) last.set(each[whose], Math.max(each.step, last.get(each[whose]) ?? -1));
    return entries.filter(each => each.step === last.get(each[whose]));
  }

  function outcome(numbers) {
    if (!("policy_margin" in numbers)) return null;
    const right = numbers.policy_margin > 0, before = "ref_margin" in numbers ? numbers.ref_margin > 0 : null;
    return { right, before, changed: before !== null && before !== right };
  }

  function valuesOf(prompt, name, asked) {
    const [kind, key] = [name.slice(0, 1), name.slice(2)];
    const answers = atStep(prompt.answers, "model", asked.step).filter(a => asked.model === null || a.model === asked.model);
    if (kind === "s") return answers.map(a => a.scores[key]).filter(Number.isFinite);
    if (kind === "t") return answers.map(a => a.tokens);
    return prompt.pairs.flatMap(q => atStep(q.at, "run", asked.step)).map(a => a.numbers[key]).filter(Number.isFinite);
  }

  function textOf(prompt) {
    prompt.searched ??= [prompt.key, ...prompt.prompt.map(turn => turn[1]), ...prompt.pairs.flatMap(q => [q.row, q.chosen, q.rejected]),
      ...prompt.answers.map(a => a.text)].join("\n").toLowerCase();
    return prompt.searched;
  }

  function fits(prompt, asked) {
    if (asked.set !== null && prompt.set !== asked.set) return false;
    if (asked.model !== null || asked.end !== "") {
      const some = atStep(prompt.answers, "model", asked.step)
        .some(a => (asked.model === null || a.model === asked.model) && (asked.end === "" || a.end === asked.end));
      if (!some) return false;
    } else if (asked.step !== "" && asked.step !== "last") {
      const step = Number(asked.step);
      if (!prompt.answers.some(a => a.step === step) && !prompt.pairs.some(q => q.at.some(a => a.step === step))) return false;
    }
    if (asked.outcome) {
      const some = prompt.pairs.flatMap(q => atStep(q.at, "run", asked.step)).map(a => outcome(a.numbers)).some(o => o && (
        asked.outcome === "right" ? o.right : asked.outcome === "wrong" ? !o.right
          : asked.outcome === "gained" ? o.changed && o.right : o.changed && !o.right));
      if (!some) return false;
    }
    if (asked.number && !valuesOf(prompt, asked.number, asked)
      .some(v => (asked.low === null || v >= asked.low) && (asked.high === null || v <= asked.high))) return false;
    if (asked.short !== null || asked.long !== null) {
      const lengths = [...prompt.pairs.flatMap(q => [q.chosen.length, q.rejected.length]), ...prompt.answers.map(a => a.text.length)];
      if (!lengths.some(n => (asked.short === null || n >= asked.short) && (asked.long === null || n <= asked.long))) return false;
    }
    return asked.words.every(word => textOf(prompt).includes(word));
  }

  function look() {
    const asked = wanted();
    let found = prompts.filter(prompt => fits(prompt, asked));
    if (asked.sort) {
      const of = new Map(found.map(p => [p, asked.sort === "prompt"
        ? p.prompt.reduce((n, turn) => n + turn[1].length, 0)
        : edge(valuesOf(p, asked.sort, asked), asked.order)]));
      const known = found.filter(p => of.get(p) !== null);
      known.sort((a, b) => asked.order * (of.get(a) - of.get(b)) || a.order - b.order);
      found = [...known, ...found.filter(p => of.get(p) === null)];
    } else if (asked.order < 0) found = found.reverse();
    state.found = found;
    state.page = 0;
    state.open = found.length ? found[0].order : -1;
    draw();
  }

  const edge = (values, order) => (values.length ? values.reduce((a, b) => (order * (b - a) < 0 ? b : a)) : null);

  /* ---- what is shown ---- */

  /** Characters that cannot be seen, or that turn others round, by their numbers. */
  const visible = text => text.replace(CONTROLS, c => `⟨U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);

  /** A text as nodes, with the words that were searched marked. */
  function nodes(text, words) {
    const shown = visible(text), made = document.createDocumentFragment();
    if (!words.length) { made.append(shown); return made; }
    const pattern = new RegExp(words.map(w => w.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).sort((a, b) => b.length - a.length).join("|"), "giu");
    let end = 0;
    for (const match of shown.matchAll(pattern)) {
      made.append(shown.slice(end, match.index), make("mark", {}, match[0]));
      end = match.index + match[0].length;
    }
    made.append(shown.slice(end));
    return made;
  }

  function textBlock(text, words) {
    const block = make("div", { class: "text", dir: "auto" });
    const cut = text.length > LONG;
    block.append(nodes(cut ? text.slice(0, LONG) : text, words));
    if (text === "") block.append(make("span", { class: "soft" }, "(empty)"));
    if (!cut) return block;
    const more = make("button", { type: "button", class: "more", onclick: () => {
      block.replaceChildren(nodes(text, words));
      more.remove();
    } }, `Show all ${counted(text.length)} characters`);
    return make("div", {}, block, more);
  }

  function facts(entries) {
    const list = make("dl", { class: "numbers" });
    for (const [name, value] of entries) list.append(make("div", {}, make("dt", {}, visible(name)), make("dd", {}, value)));
    return entries.length ? list : "";
  }

  function card(title, kind, about, text, words, entries) {
    return make("article", { class: `response ${kind}` },
      make("header", {}, make("b", {}, make("bdi", {}, visible(title))), make("span", { class: "soft" }, visible(about))),
      textBlock(text, words), facts(entries));
  }

  function badge(numbers) {
    const o = outcome(numbers);
    if (!o) return "";
    const text = o.before === null ? (o.right ? "right" : "wrong")
      : o.changed ? (o.right ? "wrong → right" : "right → wrong") : (o.right ? "stays right" : "stays wrong");
    return make("i", { class: `outcome ${o.right ? "good" : "poor"}${o.changed ? " changed" : ""}` }, text);
  }

  /** A pair: what was measured of it, and its two responses beside each other. */
  function pairNodes(pair, asked) {
    const at = atStep(pair.at, "run", asked.step), made = make("div", { class: "of-pair" });
    for (const a of at) {
      const n = a.numbers, who = `${data.runs.length > 1 ? `${data.runs[a.run]}, ` : ""}step ${a.step}`;
      const entries = ["policy_margin", "ref_margin", "difficulty", "ln_ches", "ches", "edit_similarity", "last_hidden"].filter(k => k in n)
        .map(k => [NAMES[k] || k, show(n[k])]);
      made.append(make("div", { class: "measured" }, badge(n), make("span", { class: "soft" }, visible(`${pair.row} · ${who}`)), facts(entries)));
    }
    const cards = ["chosen", "rejected"].map(leg => {
      const entries = at.flatMap(a => {
        const n = a.numbers, who = (data.runs.length > 1 ? `${data.runs[a.run]}, ` : "") + (asked.step === "" ? `step ${a.step}, ` : "");
        return [[`${who}log π`, n[`policy_${leg}`]], ["log π_ref", n[`ref_${leg}`]], ["change", n[`${leg}_change`]], ["tokens", n[`length_${leg}`]]]
          .filter(([, value]) => Number.isFinite(value)).map(([name, value]) => [name, show(value)]);
      });
      return card(leg, leg, "in the data", pair[leg], asked.words, entries);
    });
    made.append(make("div", { class: "responses" }, ...cards));
    return made;
  }

  function opened(prompt, asked) {
    const made = make("div", { class: "opened" });
    for (const [role, text] of prompt.prompt) {
      made.append(make("div", { class: "turn" }, role ? make("b", {}, visible(role)) : "", textBlock(text, asked.words)));
    }
    const answers = [...atStep(prompt.answers, "model", asked.step)].sort((a, b) => a.model - b.model || a.step - b.step || a.sample - b.sample);
    const cards = answers.map(a => {
      const about = [`step ${a.step}`, answers.some(b => b.sample) ? `sample ${a.sample}` : "", a.tokens ? `${counted(a.tokens)} tokens` : "", a.end].filter(Boolean).join(" · ");
      return card(data.models[a.model], `model c${a.model % 6}`, about, a.text, asked.words,
        Object.entries(a.scores).map(([name, value]) => [name, show(value)]));
    });
    if (cards.length) made.append(make("div", { class: "responses" }, ...cards));
    made.append(...prompt.pairs.map(pair => pairNodes(pair, asked)));
    made.append(make("a", { class: "link soft", href: `#prompt-${encodeURIComponent(prompt.key)}` }, "Link to this prompt"));
    return made;
  }

  function snippet(prompt, asked) {
    const last = prompt.prompt.length ? prompt.prompt[prompt.prompt.length - 1][1] : "";
    const text = last.replace(/\s+/g, " ").trim();
    const at = asked.words.length ? text.toLowerCase().indexOf(asked.words[0]) : -1;
    const from = at > SNIPPET / 2 ? at - 40 : 0;
    return nodes((from ? "…" : "") + text.slice(from, from + SNIPPET) + (text.length > from + SNIPPET ? "…" : ""), asked.words);
  }

  function row(prompt, asked) {
    const open = prompt.order === state.open, item = make("li", { class: open ? "open" : "", "data-order": prompt.order });
    const first = prompt.pairs.length ? atStep(prompt.pairs[0].at, "run", asked.step)[0] : null;
    const models = new Set(prompt.answers.map(a => a.model)).size;
    const about = [data.sets.length > 1 ? data.sets[prompt.set] : "", prompt.pairs.length > 1 ? `${prompt.pairs.length} pairs` : prompt.pairs.length ? "pair" : "",
      models ? `${models} model${models > 1 ? "s" : ""}` : ""].filter(Boolean).join(" · ");
    const line = make("button", { type: "button", class: "line", "aria-expanded": String(open), onclick: () => choose(open ? -1 : prompt.order) },
      make("span", { class: "snippet", dir: "auto" }, snippet(prompt, asked)),
      make("span", { class: "about" }, first ? badge(first.numbers) : "", make("span", { class: "soft" }, visible(about))));
    item.append(line);
    if (open) item.append(opened(prompt, asked));
    return item;
  }

  function draw() {
    const asked = wanted(), pages = Math.max(1, Math.ceil(state.found.length / ROWS));
    state.page = Math.min(state.page, pages - 1);
    const start = state.page * ROWS, shown = state.found.slice(start, start + ROWS);
    id("rows").replaceChildren(...shown.map(prompt => row(prompt, asked)));
    id("rows").setAttribute("start", start + 1);
    id("found").textContent = shown.length
      ? `${counted(start + 1)} to ${counted(start + shown.length)} of ${counted(state.found.length)}${state.found.length < prompts.length ? ` found among ${counted(prompts.length)}` : ""}`
      : `Nothing found among ${counted(prompts.length)}; clear a filter.`;
    id("page").textContent = `page ${counted(state.page + 1)} of ${counted(pages)}`;
    id("pages").hidden = pages < 2;
    id("earlier").disabled = state.page === 0;
    id("later").disabled = state.page === pages - 1;
  }

  function choose(order) {
    state.open = order;
    if (order >= 0) history.replaceState(null, "", `#prompt-${encodeURIComponent(prompts[order].key)}`);
    draw();
    const line = document.querySelector(`#rows li[data-order="${order}"] .line`);
    if (line) line.focus({ preventScroll: true });
  }

  /** Opens a prompt wherever it is; filters that hide it are cleared. */
  function go(order) {
    if (!state.found.some(prompt => prompt.order === order)) { id("filters").reset(); look(); }
    const place = state.found.findIndex(prompt => prompt.order === order);
    state.page = Math.floor(place / ROWS);
    state.open = order;
    draw();
    document.querySelector(`#rows li[data-order="${order}"]`).scrollIntoView({ block: "start" });
  }

  function followed() {
    if (!location.hash.startsWith("#prompt-")) return;
    let key = location.hash.slice("#prompt-".length);
    try { key = decodeURIComponent(key); } catch { /* as it is */ }
    if (byKey.has(key)) go(byKey.get(key));
  }

  function turn(by) {
    state.page += by;
    state.open = -1;
    draw();
    id("found").scrollIntoView({ block: "start" });
  }

  let waiting = 0;
  const soon = () => { clearTimeout(waiting); waiting = setTimeout(look, 120); };
  offered();
  id("filters").hidden = false;
  id("filters").addEventListener("input", event => (event.target.localName === "select" ? look() : soon()));
  id("filters").addEventListener("reset", () => setTimeout(look, 0));
  id("filters").addEventListener("submit", event => event.preventDefault());
  id("earlier").addEventListener("click", () => turn(-1));
  id("later").addEventListener("click", () => turn(1));
  addEventListener("hashchange", followed);
  look();

  /* ---- pairs in the drawing of CHES against displacement ---- */

  function pickable(svg) {
    const box = Object.fromEntries(["x0", "x1", "y0", "y1", "left", "right", "top", "floor"].map(name => [name, Number(svg.dataset[name])]));
    const set = data.sets.indexOf(svg.dataset.set), step = Number(svg.dataset.step);
    const clip = (v, a, b) => Math.min(Math.max(v, a), b);
    const points = [];
    for (const prompt of prompts) {
      if (prompt.set !== set) continue;
      for (const pair of prompt.pairs) {
        const at = pair.at.find(a => a.step === step);
        if (!at || !Number.isFinite(at.numbers.ln_ches) || !Number.isFinite(at.numbers.chosen_change)) continue;
        points.push({ order: prompt.order, pair, numbers: at.numbers,
          x: box.left + (box.right - box.left) * (clip(at.numbers.ln_ches, box.x0, box.x1) - box.x0) / (box.x1 - box.x0),
          y: box.top + (box.floor - box.top) * (box.y1 - clip(at.numbers.chosen_change, box.y0, box.y1)) / (box.y1 - box.y0) });
      }
    }
    if (!points.length) return;
    points.sort((a, b) => a.x - b.x || a.y - b.y);
    const ring = document.createElementNS("http://www.w3.org/2000/svg", "circle");
    ring.setAttribute("r", "6");
    ring.setAttribute("class", "ring");
    ring.setAttribute("data-only-here", "");
    const told = make("output", { class: "picked", "aria-live": "polite" }, "Point at a pair.");
    let current = -1;
    const pick = i => {
      current = i;
      const p = points[i], prompt = prompts[p.order];
      ring.setAttribute("cx", p.x);
      ring.setAttribute("cy", p.y);
      svg.append(ring);
      const last = prompt.prompt.length ? prompt.prompt[prompt.prompt.length - 1][1] : "";
      told.replaceChildren(make("b", {}, make("bdi", {}, visible(p.pair.row))), make("span", {}, `LN-CHES ${show(p.numbers.ln_ches)}, change ${show(p.numbers.chosen_change)} nats`),
        make("bdi", { class: "soft" }, visible(last.replace(/\s+/g, " ").slice(0, 90))));
    };
    const near = event => {
      const size = svg.getBoundingClientRect(), [, , width, height] = svg.getAttribute("viewBox").split(" ").map(Number);
      const x = (event.clientX - size.left) * width / size.width, y = (event.clientY - size.top) * height / size.height;
      let best = -1, least = 18 * 18;
      points.forEach((p, i) => {
        const away = (p.x - x) ** 2 + (p.y - y) ** 2;
        if (away < least) { best = i; least = away; }
      });
      return best;
    };
    svg.setAttribute("tabindex", "0");
    svg.after(told);
    svg.addEventListener("pointermove", event => { const i = near(event); if (i >= 0) pick(i); });
    svg.addEventListener("click", event => { const i = near(event); if (i >= 0) { pick(i); open_(points[i].order); } });
    svg.addEventListener("keydown", event => {
      const by = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
      if (by) { event.preventDefault(); pick(clip(current < 0 ? 0 : current + by, 0, points.length - 1)); }
      if (event.key === "Enter" && current >= 0) open_(points[current].order);
    });
  }

  const open_ = order => { go(order); history.replaceState(null, "", `#prompt-${encodeURIComponent(prompts[order].key)}`); };
  document.querySelectorAll("svg.pick").forEach(pickable);
  followed();
})();
