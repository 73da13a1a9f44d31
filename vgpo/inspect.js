"use strict";
const { runs } = JSON.parse(document.getElementById("data").textContent);
const LETTERS = ["A", "B"], two = runs.length > 1;
const $ = selector => document.querySelector(selector);
const esc = text => String(text).replace(/[&<>"']/g, c => `&#${c.charCodeAt(0)};`);
const fixed = (value, digits = 2) => value === null || value === undefined ? "–" : value.toFixed(digits).replace("-", "−");
const signed = (value, digits = 2) => value === null ? "–" : +value.toFixed(digits) === 0 ? "0" : (value > 0 ? "+" : "") + fixed(value, digits);
const short = value => !value ? "0" : Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3 ? value.toExponential(1).replace("-", "−") : String(+value.toPrecision(3)).replace("-", "−");
const mean = values => values.reduce((a, b) => a + b, 0) / values.length;
const named = i => two ? `<b class="${LETTERS[i]}">${LETTERS[i]}</b> ` : "";
const state = { epoch: null, group: 0, other: null, picked: null, task: "all", outcome: runs.map(() => "all"), page: 0 };

// --- images, which are cells of sheets ---
const sheets = [];
function register(sheet) {
  if (!sheet) return;
  sheet.id = sheets.push(sheet) - 1;
  const rule = document.createElement("style");
  rule.textContent = `.sheet${sheet.id}{background-image:url(${sheet.url});--columns:${sheet.columns};--rows:${sheet.rows};--ratio:${sheet.width}/${sheet.height}}`;
  document.head.append(rule);
}
for (const run of runs) {
  for (const epoch of run.epochs) register(epoch.sheet);
  if (run.held) for (const side of ["before", "after"]) register(run.held[side]);
}
function thumb(sheet, cell, label, more = "") {
  if (!sheet || cell === null || cell === undefined) return "";
  const place = (i, count) => count > 1 ? `${100 * i / (count - 1)}%` : "0%";
  const x = place(cell % sheet.columns, sheet.columns), y = place(Math.floor(cell / sheet.columns), sheet.rows);
  return `<i class="thumb sheet${sheet.id} ${sheet.width <= 48 ? "tiny" : ""} ${more}" style="--x:${x};--y:${y}" role="img" aria-label="${esc(label)}"></i>`;
}

// --- the head ---
function head() {
  const list = pairs => `<dl>${pairs.map(([key, value]) => `<dt>${esc(key)}</dt><dd>${esc(value)}</dd>`).join("")}</dl>`;
  $("#head").innerHTML = `<div class="runs">${runs.map((run, i) => `<div class="run"><h1>${named(i)}${esc(run.name)}</h1>
    <p class="what">${esc(run.what)}</p>
    <div class="cards">${run.cards.map(([label, value, note]) => `<div class="card"><b>${esc(value)}</b><span>${esc(label)}${note ? `<br>${esc(note)}` : ""}</span></div>`).join("")}</div>
    ${run.notes.map(note => `<p class="note">${esc(note)}</p>`).join("")}
    <details><summary>Recipe and versions</summary>${list(run.facts)}</details></div>`).join("")}</div>`;
}

// --- curves ---
const CURVES = {
  "reward": ["Reward", "mean of the finished training images", "eval/reward"], "accuracy": ["Accuracy", "share that the strict verdict accepts", "eval/accuracy"],
  "reward_std": ["Spread within groups", "what there is to learn from"], "frac_reward_zero_std": ["Groups without spread", "share of images: nothing to compare"],
  "clip_ratio": ["Clipped ratios", "share outside the clip range"], "ratio/abs_dev_mean": ["|ratio − 1|", "how far updates go from the rollouts"],
  "kl": ["KL to the start", "to the model before training"], "advantage/abs_mean": ["|advantage|", "mean over images and steps"], "grad_norm": ["Gradient norm", "before it is clipped"],
};
function trailing(points, window = 10) { return points.map(([e], i) => [e, mean(points.slice(Math.max(0, i - window + 1), i + 1).map(p => p[1]))]); }
function chart(key, [title, meaning, dots]) {
  const series = runs.map(run => run.curves[key] || []), held = runs.map(run => (dots && run.curves[dots]) || []);
  const all = [...series, ...held].flat();
  if (!all.length) return "";
  const W = 300, H = 132, L = 38, B = 24, T = 6, R = 6;
  let [low, high] = [Math.min(...all.map(p => p[1])), Math.max(...all.map(p => p[1]))];
  const last = Math.max(1, ...all.map(p => p[0])), pad = (high - low || Math.abs(high) || 1) * .06;
  [low, high] = [low - pad * (low !== 0), high + pad];
  const x = e => L + (W - L - R) * e / last, y = v => T + (H - T - B) * (1 - (v - low) / (high - low));
  const path = points => points.map(([e, v], i) => `${i ? "L" : "M"}${x(e).toFixed(1)} ${y(v).toFixed(1)}`).join("");
  const ticks = [low + pad * (low !== 0), (low + high) / 2, high - pad];
  return `<div class="chart" data-key="${esc(key)}" data-box="${[W, L, R, last]}"><h3>${esc(title)}</h3><span class="soft" data-meaning="${esc(meaning)}">${esc(meaning) || "&nbsp;"}</span>
    <svg viewBox="0 0 ${W} ${H}" role="img" aria-label="${esc(title)} over epochs">
    ${ticks.map(v => `<line class="grid" x1="${L}" x2="${W - R}" y1="${y(v)}" y2="${y(v)}"/><text x="${L - 5}" y="${y(v) + 3.5}" text-anchor="end">${short(v)}</text>`).join("")}
    <text x="${L}" y="${H - 1}">epoch 0</text><text x="${W - R}" y="${H - 1}" text-anchor="end">${last}</text>
    ${series.map((points, i) => `<g class="${LETTERS[i]}"><path class="thin" d="${path(points)}"/><path class="thick" d="${path(trailing(points))}"/>
      ${held[i].map(([e, v]) => `<circle cx="${x(e)}" cy="${y(v)}" r="3"/>`).join("")}</g>`).join("")}
    ${runs[0].epochs.map(({ epoch }) => `<path class="kept" data-epoch="${epoch}" d="M${x(epoch) - 5} ${H - B + 9}h10l-5-7z" ><title>film strips of epoch ${epoch}</title></path>`).join("")}
    <line class="cursor" y1="${T}" y2="${H - B}"/></svg></div>`;
}
function curves() {
  const known = new Set([...Object.keys(CURVES), ...Object.values(CURVES).map(c => c[2])]);
  const more = [...new Set(runs.flatMap(run => Object.keys(run.curves)))].filter(key => !known.has(key)).sort();
  $("#curves .charts").innerHTML = Object.entries(CURVES).map(([key, words]) => chart(key, words)).join("") || `<p class="soft">No epoch has been trained yet.</p>`;
  $("#curves .more").innerHTML = more.map(key => chart(key, [key, ""])).join("");
  $("#curves details").hidden = !more.length;
  for (const box of document.querySelectorAll(".chart")) {
    const [W, L, R, last] = box.dataset.box.split(",").map(Number), line = box.querySelector(".cursor"), words = box.querySelector(".soft");
    const { key } = box.dataset;
    box.addEventListener("pointermove", event => {
      const frame = box.querySelector("svg").getBoundingClientRect();
      const epoch = Math.max(0, Math.min(last, Math.round(((event.clientX - frame.left) / frame.width * W - L) / (W - L - R) * last)));
      const at = runs.map((run, i) => {
        const found = (run.curves[key] || []).reduce((best, p) => !best || Math.abs(p[0] - epoch) < Math.abs(best[0] - epoch) ? p : best, null);
        return found ? `${named(i)}${short(found[1])}` : "";
      });
      words.innerHTML = `epoch ${epoch}: ${at.filter(Boolean).join(" · ")}`;
      const px = L + (W - L - R) * epoch / last;
      line.setAttribute("x1", px); line.setAttribute("x2", px); line.style.visibility = "visible";
    });
    box.addEventListener("pointerleave", () => { line.style.visibility = "hidden"; words.textContent = words.dataset.meaning || "\u00a0"; });
  }
}

// --- what is chosen ---
function picker(label, name, options, chosen) {
  return `<div class="picker" role="group" aria-label="${esc(label)}"><span>${esc(label)}</span>${options.map(([value, text]) =>
    `<button data-${name}="${esc(value)}" aria-pressed="${String(value) === String(chosen)}">${esc(text)}</button>`).join("")}</div>`;
}
const nearest = (run, epoch) => run.epochs.reduce((best, e) => !best || Math.abs(e.epoch - epoch) < Math.abs(best.epoch - epoch) ? e : best, null);
function views() {
  const lead = (runs.find(run => run.epochs.length) || {}), first = lead.epochs ? nearest(lead, state.epoch) : null;
  const wanted = first && first.groups[state.group];
  return runs.map((run, i) => {
    const epoch = run.epochs.length ? nearest(run, state.epoch) : null;
    const group = epoch && (epoch.groups.find(g => wanted && g.prompt === wanted.prompt) || epoch.groups[state.group]);
    return { run, i, epoch, group };
  }).filter(view => view.group);
}
function pickers(found) {
  if (!found.length) return "";
  const lead = found[0], others = [...new Set(found.flatMap(view => view.epoch.estimators))];
  return picker("epoch", "epoch", lead.run.epochs.map(e => [e.epoch, e.epoch]), lead.epoch.epoch)
    + picker("prompt", "group", lead.epoch.groups.map((g, i) => [i, g.prompt.length > 46 ? g.prompt.slice(0, 45) + "…" : g.prompt]), state.group)
    + picker("beside what this run paid:", "other", others.map(name => [name, name]), state.other);
}

// --- film strips ---
const shade = (value, most) => {
  const t = most ? Math.min(1, Math.abs(value) / most) : 0;
  return `class="${t > .62 ? "deep" : ""}" style="--t:${t.toFixed(3)};--side:var(--${value < 0 ? "neg" : "pos"})"`;
};
function heat(values, most, trained, name) {
  return `<div class="heat" data-name="${esc(name)}">${values.map((v, j) => `<i ${shade(v, most).replace('class="', `class="${trained[j] ? "" : "idle "}`)} title="step ${j}: ${signed(v, 3)}${trained[j] ? "" : ", not trained"}">${signed(v, 1)}</i>`).join("")}</div>`;
}
function compare(group, other) {
  const pairs = group.samples.flatMap(s => s.advantages.paid.map((v, j) => [v, s.advantages[other][j], s.trained[j]])).filter(p => p[2]);
  if (!pairs.length) return "";
  const [p, o] = [0, 1].map(k => pairs.map(pair => pair[k])), [mp, mo] = [mean(p), mean(o)];
  const apart = pairs.filter(([a, b]) => a * b < 0).length;
  const cov = mean(pairs.map(([a, b]) => (a - mp) * (b - mo))), spread = Math.sqrt(mean(p.map(v => (v - mp) ** 2)) * mean(o.map(v => (v - mo) ** 2)));
  return `Of the ${pairs.length} trained steps here, ${other} would have paid ${apart} with the opposite sign${spread > 1e-9 ? `; the correlation of the two is ${fixed(cov / spread)}` : ""}.`;
}
function bars(title, meaning, rows, colors, labels) {
  const W = 260, H = 104, B = 16, values = rows.flat().filter(v => v !== null);
  const high = Math.max(0, ...values) || (Math.min(...values) < 0 ? 0 : 1), low = Math.min(0, ...values), y = v => 12 + (H - B - 20) * (1 - (v - low) / (high - low || 1));
  const wide = W / rows[0].length, w = (wide - 4) / rows.length;
  return `<div><h3>${title}</h3><span class="soft">${meaning}</span><svg viewBox="0 0 ${W} ${H}" role="img" aria-label="${title}">
    ${rows.map((row, r) => row.map((v, j) => v === null ? "" : `<rect class="${typeof colors[r] === "string" ? colors[r] : colors[r][j]}" x="${j * wide + 2 + r * w}" width="${w - .5}" y="${y(Math.max(0, v))}" height="${Math.max(.5, Math.abs(y(0) - y(v)))}"><title>${labels[j]}: ${fixed(v, 3)}</title></rect>
      ${rows.length === 1 ? `<text x="${(j + .5) * wide}" y="${v < 0 ? y(v) + 10 : y(v) - 3}">${fixed(v, Math.abs(v) < 10 ? 2 : 1).replace(/^(−?)0\./, "$1.")}</text>` : ""}`).join("")).join("")}
    <line x1="0" x2="${W}" y1="${y(0)}" y2="${y(0)}"/>${labels.map((l, j) => `<text x="${(j + .5) * wide}" y="${H - 3}">${l.replace(/^\D+/, "")}</text>`).join("")}</svg></div>`;
}
function detail(view, sample, other, rank) {
  const { epoch, i } = view, steps = sample.values.map((_, j) => `step ${j}`), has = other in sample.advantages;
  const scored = sample.values.map((_, j) => epoch.states.includes(j + 1) ? "paid" : "unscored");
  const rows = has ? [sample.advantages.paid, sample.advantages[other]] : [sample.advantages.paid];
  return `<div class="bars ${LETTERS[i]}" data-rank="${rank}">
    ${bars("Reward", "after each step; grey: not scored, counts as the next one", [sample.rewards.slice(1)], [scored], steps)}
    ${bars("Value", `discounted rewards from here on, γ = ${view.run.gamma}`, [sample.values], ["paid"], steps)}
    ${bars("Weight ω", sample.weights ? "value over its mean along the steps" : "undefined, as a value is negative", sample.weights ? [sample.weights] : [sample.values.map(() => null)], ["paid"], steps)}
    ${bars("Advantage", has ? `coloured: as this run paid; grey: ${esc(other)}` : "as this run paid", rows, ["paid", "other"], steps)}</div>`;
}
function strips() {
  const found = views();
  if (found.length && !found.some(view => view.epoch.estimators.includes(state.other))) state.other = found[0].epoch.estimators[0] || null;
  $("#strips .pickers").innerHTML = pickers(found);
  const { other } = state;
  const most = Math.max(1e-9, ...found.flatMap(({ group }) => group.samples.flatMap(s => Object.values(s.advantages).flat().map(Math.abs))));
  $("#strips .groups").innerHTML = found.map(view => {
    const { run, i, epoch, group } = view, has = epoch.estimators.includes(other), steps = group.samples[0].advantages.paid.map((_, j) => j);
    const numbers = `<div class="heat">${steps.map(j => `<i>${j}</i>`).join("")}</div>`;
    const picked = Math.min(state.picked ?? 0, group.samples.length - 1);
    return `<div class="group" data-run="${i}" style="--frame:${epoch.frames.length > 7 ? "54px;--cell:26" : 72}px">
      <div class="prompt">${named(i)}“${esc(group.prompt)}” ${group.tag ? `<span class="tag">${esc(group.tag)}</span>` : ""}</div>
      <div class="soft">epoch ${epoch.epoch} · reward of the group ${fixed(group.mean)} ± ${fixed(group.std)}${group.size > group.samples.length ? ` · ${group.samples.length} of its ${group.size} images` : ""}</div>
      <div class="sides"><div class="heads"><div class="strip">${epoch.frames.map(s => `<div class="frame">state ${s}</div>`).join("")}</div>
        <div class="heats"><div><span class="name">paid: ${esc(run.paid)}</span>${numbers}</div>${has ? `<div><span class="name">${esc(other)}</span>${numbers}</div>` : ""}</div></div>
      ${group.samples.map((sample, rank) => `<div class="row ${rank === picked ? "on" : ""}" data-sample="${rank}">
        <div class="strip" role="button" tabindex="0" aria-pressed="${rank === picked}" aria-label="image ${rank + 1}, reward ${fixed(sample.rewards.at(-1))}">${epoch.frames.map((s, f) => `<div class="frame">${thumb(epoch.sheet, sample.cell + f, `clean estimate at state ${s}`)}${fixed(sample.rewards[s])}</div>`).join("")}</div>
        <div class="heats">${heat(sample.advantages.paid, most, sample.trained, "paid")}${has ? heat(sample.advantages[other], most, sample.trained, other) : ""}</div></div>`).join("")}</div>
      ${has ? `<p class="verdict">${esc(compare(group, other))}</p>` : ""}
      ${detail(view, group.samples[picked], other, picked)}</div>`;
  }).join("") + (found.length ? `<div class="legend"><span>advantage ${fixed(-most, 1)}</span><span class="ramp"></span><span>${signed(most, 1)}, one scale for all estimators</span><span class="hatch"></span><span>a step that is not trained</span></div>
    ${found.map(({ run, i, epoch }) => epoch.skipped.length ? `<details><summary>${named(i)}Estimators that cannot be compared here</summary><dl>${epoch.skipped.map(([name, why]) => `<dt>${esc(name)}</dt><dd>${esc(why)}</dd>`).join("")}</dl></details>` : "").join("")}`
    : `<p class="soft">No film strips were kept.</p>`);
  for (const mark of document.querySelectorAll(".kept")) mark.classList.toggle("on", found.length > 0 && +mark.dataset.epoch === found[0].epoch.epoch);
}

// --- ratio and clip ---
const MEANINGS = {
  "ratio/abs_dev_mean": "mean |ratio − 1|", "clip_ratio": "share of ratios outside the clip range", "masked": "share that is left out",
  "kl_old": "KL from the policy that drew the images", "drift": "squared change of the velocity", "kl": "KL to the model before training",
};
function stepTable(name, rows, steps) {
  if (rows.flat().every(v => v === 0)) return `<p><b>${esc(name)}</b> <span class="soft">${MEANINGS[name] || ""}: 0 in every step of every update</span></p>`;
  const most = Math.max(...rows.flat().map(Math.abs)) || 1;
  return `<div class="scroll"><table class="steps"><caption>${esc(name)} <span>${MEANINGS[name] || ""}</span></caption><tr><th>step</th>${steps.map(s => `<th>${s}</th>`).join("")}</tr>
    ${rows.map((row, m) => `<tr><th>update ${m + 1}</th>${row.map(v => `<td style="--t:${(Math.abs(v || 0) / most).toFixed(3)}" title="${v}">${v === null ? "–" : short(v)}</td>`).join("")}</tr>`).join("")}</table></div>`;
}
function ratios() {
  const first = ["ratio/abs_dev_mean", "clip_ratio", "masked", "kl_old", "drift", "kl"];
  $("#ratios .stats").innerHTML = `<div class="both">${views().map(({ run, i, epoch }) => {
    const { steps, updates } = epoch.stats, names = first.filter(name => name in updates);
    const width = Object.values(updates)[0][0].length, heads = steps || Array.from({ length: width }, (_, j) => `${j + 1}. of its window`);
    return `<div>${two ? `<h3>${named(i)}${esc(run.name)}</h3>` : ""}<div class="tables">${(names.length ? names : Object.keys(updates).slice(0, 3)).map(name => stepTable(name, updates[name], heads)).join("")}</div></div>`;
  }).join("") || `<p class="soft">Nothing was kept.</p>`}</div>`;
}

// --- prompts ---
function prompts() {
  $("#prompts .spread").innerHTML = `<div class="both">${views().map(({ run, i, epoch }) => {
    const flat = epoch.spread.filter(p => p.std < 1e-6), shelf = (title, items) => `<h3>${title}</h3><div class="shelf">${items.map(({ cell, prompt, reward }) => `<figure>${thumb(epoch.sheet, cell, prompt)}<figcaption><b>${fixed(reward)}</b> ${esc(prompt)}</figcaption></figure>`).join("")}</div>`;
    return `<div>${two ? `<h3>${named(i)}${esc(run.name)}, epoch ${epoch.epoch}</h3>` : ""}
      <h3>${flat.length} of ${epoch.spread.length} prompts without spread</h3>
      <p class="lead">${flat.length ? "All images of such a prompt have the same reward, so its group says nothing about which was better, and GRPO pays nothing." : "The images of every prompt differ in their reward, so every group has something to say."}</p>
      ${flat.length ? `<ul class="flat">${flat.map(p => `<li><b>${fixed(p.mean)}</b> ${esc(p.prompt)}</li>`).join("")}</ul>` : ""}
      <details><summary>All prompts, by spread</summary><ul class="flat">${epoch.spread.map(p => `<li><b>${fixed(p.mean)} ± ${fixed(p.std)}</b> ${esc(p.prompt)}</li>`).join("")}</ul></details>
      ${shelf("Best images", epoch.best)}${shelf("Worst images", epoch.worst)}</div>`;
  }).join("") || `<p class="soft">Nothing was kept.</p>`}</div>`;
}

// --- held out ---
const PER_PAGE = 24;
const verdict = value => value === null ? "" : value ? "right" : "wrong";
function results() {
  $("#held .results").innerHTML = `<div class="both">${runs.map((run, i) => `<div>${two ? `<h3>${named(i)}${esc(run.name)}</h3>` : ""}
    ${run.table.length ? `<div class="scroll"><table><thead><tr><th>held out</th><th>before</th><th>after</th><th>change ± standard error</th></tr></thead><tbody>${run.table.map(row => `<tr><th>${esc(row[0])}</th>${row.slice(1).map(cell => `<td>${esc(cell).replace("-", "−")}</td>`).join("")}</tr>`).join("")}</tbody></table></div>` : ""}
    ${run.figure ? `<img src="${run.figure}" alt="held-out images before and after">` : ""}</div>`).join("")}</div>`;
}
function held() {
  const lead = runs.findIndex(run => run.held);
  if (lead < 0) { $("#held .filters").innerHTML = $("#held .count").textContent = ""; return; }
  const items = runs[lead].held.items.map(item => ({ item, others: runs.map(run => run.held && (run === runs[lead] ? item : run.held.items.find(o => o.row === item.row && o.prompt === item.prompt))) }));
  const tasks = [...new Set(items.map(({ item }) => item.tag))].sort();
  $("#held .filters").innerHTML = (tasks.length > 1 ? picker("task", "task", [["all", "all"], ...tasks.map(t => [t, t])], state.task) : "")
    + runs.map((run, i) => {
      if (!run.held || !run.held.counts) return "";
      const total = Object.entries(run.held.counts).filter(([task]) => state.task === "all" || task === state.task).map(([, counts]) => counts);
      const of = name => total.reduce((sum, counts) => sum + (counts[name] || 0), 0);
      return picker(two ? `${LETTERS[i]}: outcome` : "outcome", `outcome${i}`, [["all", "all"], ...run.held.outcomes.map(name => [name, `${name} (${of(name)})`])], state.outcome[i]);
    }).join("");
  const shown = items.filter(({ item, others }) => (state.task === "all" || item.tag === state.task) && others.every((o, i) => state.outcome[i] === "all" || (o && o.outcome === state.outcome[i])));
  state.page = Math.max(0, Math.min(state.page, Math.ceil(shown.length / PER_PAGE) - 1));
  $("#held .count").textContent = `${shown.length} of the ${items.length} images that were kept, evenly spaced within each task. In brackets: how many there are among all ${runs[lead].held.total}.`;
  $("#held .pairs").style.setProperty("--pair", two ? "330px" : "210px");
  $("#held .pairs").innerHTML = shown.slice(state.page * PER_PAGE, (state.page + 1) * PER_PAGE).map(({ item, others }) => {
    const figure = (run, o, side, label) => o && o[side] ? `<figure>${thumb(run.held[side], o[side].cell, `${label}: ${item.prompt}`, verdict(o[side].strict))}<figcaption>${label} <b>${fixed(o[side].scaled)}</b></figcaption></figure>` : "";
    return `<div class="pair" data-outcome="${esc(item.outcome || "")}" data-task="${esc(item.tag)}"><p>${esc(item.prompt)}</p><div class="images">${figure(runs[lead], item, "before", "before")}${others.map((o, i) => o ? figure(runs[i], o, "after", `${named(i)}after`.replace(/<[^>]+>/g, "")) : "").join("")}</div></div>`;
  }).join("");
  const pages = Math.ceil(shown.length / PER_PAGE);
  $("#held .pager").innerHTML = pages > 1 ? `<button data-page="-1" ${state.page ? "" : "disabled"}>← back</button><span>page ${state.page + 1} of ${pages}</span><button data-page="1" ${state.page < pages - 1 ? "" : "disabled"}>next →</button>` : "";
}

// --- what a click does ---
const epochViews = () => { strips(); ratios(); prompts(); };
function refocus(selector) { const element = document.querySelector(selector); if (element) element.focus({ preventScroll: true }); }
document.addEventListener("click", event => {
  const button = event.target.closest("button"), mark = event.target.closest(".kept"), row = event.target.closest(".row");
  if (mark) { state.epoch = +mark.dataset.epoch; state.group = 0; epochViews(); return; }
  if (row) { state.picked = +row.dataset.sample; const run = row.closest(".group").dataset.run; strips(); refocus(`.group[data-run="${run}"] .row.on .strip`); return; }
  if (!button) return;
  const [name, value] = Object.entries(button.dataset)[0];
  if (name === "epoch") { state.epoch = +value; state.picked = null; epochViews(); }
  else if (name === "group") { state.group = +value; state.picked = null; strips(); }
  else if (name === "other") { state.other = value; strips(); }
  else if (name === "task") { state.task = value; state.page = 0; held(); }
  else if (name.startsWith("outcome")) { state.outcome[+name.slice(7)] = value; state.page = 0; held(); }
  else if (name === "page") { state.page += +value; held(); }
  refocus(`button[data-${name}="${CSS.escape(value)}"]`);
});
document.addEventListener("keydown", event => {
  const strip = event.target.closest(".strip[role=button]");
  if (strip && (event.key === "Enter" || event.key === " ")) { event.preventDefault(); strip.click(); }
});
const kept = runs.filter(run => run.epochs.length).map(run => run.epochs.map(e => e.epoch));
if (kept.length) state.epoch = kept[0].filter(e => kept.every(list => list.includes(e))).at(-1) ?? kept[0].at(-1);
head(); curves(); epochViews(); results(); held();
