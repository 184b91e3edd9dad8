// The console: asks the server's own paths and shows what they say. Text is only ever set as text, never as markup.

const $ = (id) => document.getElementById(id);
const make = (tag, props = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), props);
  element.append(...children);
  return element;
};

// ---- requests ----

$("key").value = sessionStorage.getItem("key") ?? "";
$("key").addEventListener("change", () => {
  sessionStorage.setItem("key", $("key").value);
  refresh();
});

async function ask(path, { method = "GET", data } = {}) {
  const headers = $("key").value ? { authorization: `Bearer ${$("key").value}` } : {};
  const answer = await fetch(path, { method, headers, body: data === undefined ? undefined : JSON.stringify(data) });
  const text = await answer.text();
  const type = answer.headers.get("content-type") ?? "";
  const body = type.includes("json") ? JSON.parse(text) : text;
  if (!answer.ok) {
    const error = body.error ?? { message: `${answer.status} ${text}` };
    const again = answer.headers.get("retry-after");
    throw new Error([error.message, error.hint, again && `try again in ${again} s`].filter(Boolean).join(" — "));
  }
  return body;
}

function show(error) {
  $("error").textContent = error ? error.message : "";
  $("error").hidden = !error;
}

/** Run what a button asked for; the button waits, and errors are shown. */
async function act(button, work) {
  button.disabled = true;
  try {
    await work();
    show(null);
  } catch (error) {
    show(error);
  } finally {
    button.disabled = false;
  }
}

// ---- views ----

const tabs = [...document.querySelectorAll("[role=tab]")];

function choose(tab) {
  for (const other of tabs) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", chosen);
    other.tabIndex = chosen ? 0 : -1;
    $(other.getAttribute("aria-controls")).hidden = !chosen;
  }
  show(null);
  refresh();
}

tabs.forEach((tab, i) => {
  tab.addEventListener("click", () => choose(tab));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(i + step + tabs.length) % tabs.length];
    choose(next);
    next.focus();
  });
});

// ---- playground ----

function candidates(text) {
  const lines = text.split("\n").filter((line) => line.trim());
  return lines.map((line) => (line.trim().startsWith("{") ? JSON.parse(line) : line.trim()));
}

const json = (text, what) => {
  if (!text.trim()) return null;
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`${what}: ${error.message}`);
  }
};

$("rank").addEventListener("submit", (event) => {
  event.preventDefault();
  act($("go"), async () => {
    const people = candidates($("candidates").value);
    const surface = json($("surface").value, "Surface");
    const facts = json($("job-facts").value, "Facts of the job");
    const data = { query: $("job").value, candidates: people, adapter: $("adapter").value || null };
    if (surface) Object.assign(data, { surface, job_facts: facts });
    showAnswer(await ask("/v1/rank", { method: "POST", data }), people);
  });
});

function showAnswer(answer, people) {
  const largest = Math.max(1e-9, ...answer.results.flatMap((r) => (r.ledger ?? []).map((f) => Math.abs(f.contribution ?? 0))));
  const list = make("ol", { className: "results" });
  answer.results.forEach((result, place) => {
    const person = people[result.index];
    const text = typeof person === "string" ? person : person.text;
    const head = make("div", { className: "head" },
      make("span", { className: "place", textContent: place + 1 }),
      make("span", { className: "text", textContent: text }),
      make("span", { className: "score", textContent: result.score.toFixed(4) }));
    const factors = make("div", { className: "factors" });
    (result.ledger ?? []).forEach((factor, i) => {
      const share = Math.abs(factor.contribution ?? 0) / largest;
      const bar = make("span", { className: `bar bar-${i % 5}` });
      bar.style.width = `${100 * share}%`;
      const name = factor.missing ? `${factor.name} (missing)` : factor.name;
      factors.append(make("span", { textContent: name }), make("span", { className: "track" }, bar),
        make("span", { className: "number", textContent: (factor.contribution ?? 0).toFixed(4) }));
    });
    list.append(make("li", {}, head, factors));
  });
  const { usage, stack, warnings } = answer;
  const cost = `${usage.computed_tokens} tokens computed, ${usage.cached_tokens} cached, ${(usage.total_time * 1000).toFixed(0)} ms; ` +
    `${stack.model}${stack.adapter ? ` with ${stack.adapter}` : ""}, ${stack.base_digest.slice(0, 12)}`;
  const record = make("details", { className: "record" }, make("summary", { textContent: "Decision record" }),
    make("pre", { textContent: JSON.stringify(answer, null, 2), tabIndex: 0 }));
  $("answer").replaceChildren(list, make("p", { className: "note", textContent: cost }),
    ...warnings.map((w) => make("p", { className: "note", textContent: w })), record);
}

// ---- load ----

const history = []; // [seconds, tokens]
const LINE = /^([\w:]+)(?:\{(.*)\})? (\S+)$/;

function metrics(text) {
  const found = {};
  for (const line of text.split("\n")) {
    const parts = LINE.exec(line);
    if (!parts) continue;
    const labels = Object.fromEntries([...(parts[2] ?? "").matchAll(/(\w+)="([^"]*)"/g)].map((m) => [m[1], m[2]]));
    (found[parts[1].replace("uma:", "")] ??= []).push({ labels, value: Number(parts[3]) });
  }
  return found;
}

function showLoad(found) {
  const one = (name) => found[name]?.[0]?.value ?? 0;
  const now = performance.now() / 1000;
  history.push([now, one("computed_tokens_total") + one("generation_tokens_total")]);
  while (now - history[0][0] > 120) history.shift();
  const rates = history.slice(1).map(([t, n], i) => [t, Math.max(0, n - history[i][1]) / (t - history[i][0])]);
  const tiles = [
    ["running", one("num_requests_running")],
    ["in the engine's queue", one("num_requests_waiting")],
    ["waiting for their turn", one("num_requests_queued")],
    ["told to come back", one("requests_refused_total")],
    ["KV blocks in use", `${(100 * one("kv_cache_usage_perc")).toFixed(0)} %`],
    ["tokens a second", (rates.at(-1)?.[1] ?? 0).toFixed(0)],
    ["fairness lag, tokens", one("fairness_lag_tokens").toFixed(0)],
  ];
  $("tiles").replaceChildren(...tiles.map(([name, value]) =>
    make("div", { className: "tile" }, make("b", { textContent: value }), make("span", { textContent: name }))));
  const most = Math.max(1, ...rates.map((r) => r[1]));
  const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  line.setAttribute("points", rates.map(([t, r]) => `${600 - (now - t) * 5},${115 - (110 * r) / most}`).join(" "));
  $("chart").replaceChildren(line);
  $("chart").setAttribute("aria-label", `Tokens a second: now ${tiles[5][1]}, at most ${most.toFixed(0)}`);
  $("paths").replaceChildren(...(found.request_total ?? []).map(({ labels, value }) =>
    make("tr", {}, make("td", { textContent: labels.path }), make("td", { textContent: labels.status }),
      make("td", { className: "number", textContent: value }))));
}

// ---- models ----

function showModels(models, status) {
  const base = models.data[0];
  const adapters = models.data.filter((m) => m.parent).map((m) => m.id);
  $("base").textContent = base.id;
  const chosen = $("adapter").value;
  $("adapter").replaceChildren(make("option", { value: "", textContent: "none" }),
    ...adapters.map((name) => make("option", { value: name, textContent: name })));
  $("adapter").value = adapters.includes(chosen) ? chosen : "";
  $("adapters").replaceChildren(...(adapters.length ? adapters : [null]).map((name) => {
    if (name === null) return make("li", { className: "note", textContent: "none" });
    const button = make("button", { textContent: "Unload", ariaLabel: `Unload ${name}` });
    button.addEventListener("click", () => act(button, async () => {
      await ask(`/admin/adapters/${encodeURIComponent(name)}`, { method: "DELETE" });
      await refresh();
    }));
    return make("li", {}, make("span", { textContent: name }), button);
  }));
  const rows = status
    ? [["answers", `${status.current.model} (generation ${status.current.generation})`],
      ["digest", status.current.base_digest],
      ["before", status.previous ? status.previous.model : "none"],
      ["swap", [status.swap.phase, status.swap.model, status.swap.error].filter(Boolean).join(" · ")],
      ["swaps", status.swaps]]
    : [["answers", base.id], ["swap", "an admin key shows it"]];
  $("status").replaceChildren(...rows.flatMap(([k, v]) => [make("dt", { textContent: k }), make("dd", { textContent: v })]));
  $("rollback").disabled = !status?.previous;
}

const submit = (form, work) => $(form).addEventListener("submit", (event) => {
  event.preventDefault();
  act(event.submitter, async () => {
    await work();
    await refresh();
  });
});
submit("swap", () => ask("/admin/swap", { method: "POST", data: { model: $("swap-model").value, exclusive: $("swap-exclusive").checked } }));
submit("load", () => ask("/admin/adapters", { method: "POST", data: { name: $("load-name").value, path: $("load-path").value } }));
$("rollback").addEventListener("click", () => act($("rollback"), async () => {
  await ask("/admin/swap/rollback", { method: "POST" });
  await refresh();
}));

// ---- what is live ----

const visible = (view) => !$(view).hidden;

async function refresh() {
  try {
    if (visible("view-load")) showLoad(metrics(await ask("/metrics")));
    const status = visible("view-models") ? await ask("/admin/swap/status").catch(() => null) : null;
    showModels(await ask("/v1/models"), status);
    if (document.body.dataset.lost) show(null);
    delete document.body.dataset.lost;
  } catch (error) {
    document.body.dataset.lost = "yes";
    $("base").textContent = "not connected";
    show(error);
  }
}

choose(tabs[0]);
setInterval(() => document.hidden || refresh(), 2000);
