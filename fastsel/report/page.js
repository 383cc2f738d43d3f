"use strict";
// Row texts come from strangers: they are only ever set as textContent, never as HTML.
(function () {
  const root = document.documentElement;
  root.classList.add("scripted");

  const theme = document.getElementById("theme");
  const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const nameTheme = () => { theme.textContent = isDark() ? "Light" : "Dark"; };
  theme.hidden = false;
  nameTheme();
  theme.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; nameTheme(); });

  // Each turn gets a few lines, so that a long prompt does not hide the answer; a card whose texts are cut gets a button.
  function offerMore(card) {
    const texts = [...card.querySelectorAll(".text")];
    if (!texts.length || card.dataset.measured || card.clientHeight === 0) return;
    card.dataset.measured = "yes";
    card.classList.add("cut-off");
    for (const text of texts) text.classList.toggle("long", text.scrollHeight > text.clientHeight + 8);
    if (!texts.some((text) => text.classList.contains("long"))) { card.classList.remove("cut-off"); return; }
    const button = element("button", "", "Show all");
    button.type = "button";
    button.addEventListener("click", () => {
      const cut = card.classList.toggle("cut-off");
      for (const text of texts) text.classList.toggle("long", cut && text.scrollHeight > text.clientHeight + 8);
      button.textContent = cut ? "Show all" : "Show less";
    });
    card.append(button);
  }
  const measure = (within) => within.querySelectorAll(".card").forEach(offerMore);
  document.querySelectorAll("details.group").forEach((group) => {
    if (group.open) measure(group);
    group.addEventListener("toggle", () => { if (group.open) measure(group); });
  });

  function element(tag, className, text) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }
  const whole = (value) => value.toLocaleString("en-US");
  const short = (value) => Math.abs(value) >= 1000 ? whole(Math.round(value)) : String(Number(value.toPrecision(4)));

  function card(row) {
    const state = row.kept ? "kept" : "dropped";
    const made = element("article", "card " + state);
    const head = element("header");
    head.append(element("span", "score", row.score === null ? "no score" : short(row.score)), element("span", "badge " + state, state));
    if (row.rank !== null) head.append(element("span", "", "rank " + whole(row.rank)));
    head.append(element("span", "", "row " + whole(row.row)));
    if (row.source !== null) head.append(element("span", "", row.source));
    if (row.tokens !== null) head.append(element("span", "", whole(row.tokens) + " tokens"));
    if (row.id !== null) head.append(element("span", "id", row.id));
    made.append(head);
    if (row.reason) made.append(element("p", "reason", row.status + ": " + row.reason));
    const turns = element("div", "turns");
    for (const turn of row.turns) {
      const box = element("div", "turn " + (turn.role === "assistant" ? "answer" : "prompt"));
      const text = element("div", "text", turn.text);
      text.dir = "auto";
      box.append(element("span", "role", turn.role), text);
      turns.append(box);
    }
    if (row.left_out) turns.append(element("p", "left-out", whole(row.left_out) + " more characters are in the pool."));
    made.append(turns);
    return made;
  }

  const rows = JSON.parse(document.getElementById("sample").textContent);
  for (const row of rows) row.words = row.turns.map((turn) => turn.text).concat(row.id || "", row.source || "", row.reason || "").join("\n").toLowerCase();
  const control = (name) => document.getElementById(name);
  for (const name of [...new Set(rows.map((row) => row.source))].filter((name) => name !== null).sort()) {
    const option = element("option", "", name);
    option.value = "=" + name;
    control("source").append(option);
  }
  control("source").parentElement.hidden = control("source").options.length < 3;
  const page = 20;
  let shown = page;

  function draw() {
    const words = control("query").value.toLowerCase().split(/\s+/).filter(Boolean);
    const which = control("which").value, source = control("source").value, order = control("order").value;
    const found = rows.filter((row) => (which === "all" || row.kept === (which === "kept"))
      && (source === "" || row.source === source.slice(1)) && words.every((word) => row.words.includes(word)));
    if (order !== "row") {
      const sign = order === "high" ? -1 : 1;
      found.sort((a, b) => (a.score === null) - (b.score === null) || sign * (a.score - b.score) || a.row - b.row);
    }
    control("list").replaceChildren(...found.slice(0, shown).map(card));
    measure(control("list"));
    control("count").textContent = found.length + " of " + rows.length + " sampled rows" + (found.length > shown ? ", " + shown + " shown" : "");
    control("more").hidden = found.length <= shown;
  }
  const drawAnew = () => { shown = page; draw(); };
  control("query").addEventListener("input", drawAnew);
  for (const name of ["which", "source", "order"]) control(name).addEventListener("change", drawAnew);
  control("more").addEventListener("click", () => { shown += page; draw(); });
  control("filters").addEventListener("submit", (event) => event.preventDefault());
  control("filters").hidden = false;
  draw();
})();
