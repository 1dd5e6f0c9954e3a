"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const one = (selector) => document.querySelector(selector);

  // Filter: everything that shows a run says what it shows in data attributes.
  const form = one("#filter");
  const shows = (node, choice) => {
    const own = node.dataset;
    const hiding = (own.hiding || "").split(" ").filter(Boolean);
    if (hiding.some((kind) => !choice.kinds.has(kind))) return false;
    if (choice.dataset && own.dataset !== undefined && own.dataset !== choice.dataset) return false;
    if (choice.method && own.method !== undefined && own.method !== choice.method) return false;
    return own.words === undefined || choice.words.every((word) => own.words.includes(word));
  };
  const apply = () => {
    const choice = {
      dataset: one("#dataset").value,
      method: one("#method").value,
      words: one("#search").value.toLowerCase().split(/\s+/).filter(Boolean),
      kinds: new Set(all("input[name=kind]:checked").map((box) => box.value)),
    };
    for (const node of all("[data-hiding]")) {
      const shown = shows(node, choice);
      // a plot keeps its frontier: points that are not asked for step back
      if (node.classList.contains("mark")) node.classList.toggle("off", !shown);
      else node.hidden = !shown;
    }
    for (const section of all("main > section")) {
      if (section.id === "table" || !section.querySelector("[data-hiding]")) continue;
      const parts = all("[data-hiding]:not(.mark)", section);
      section.hidden = parts.every((part) => part.hidden);
    }
    const rows = all("#runs-table tbody tr");
    const shown = rows.filter((row) => !row.hidden).length;
    one("#shown").textContent = `${shown} of ${rows.length} runs shown.`;
    const empty = one("#empty");
    if (empty) {
      empty.hidden = shown > 0;
      const more = form.querySelector("fieldset") ? " Tick what else to show above." : "";
      empty.textContent = `No run fits the choice.${more}`;
      empty.previousElementSibling.hidden = shown === 0;
    }
  };
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());

  // Sorting: by the unrounded number where there is one; rows without a value stay last.
  const key = (row, index) => {
    const cell = row.cells[index];
    const given = cell.dataset.value;
    if (given === undefined) return cell.classList.contains("number") ? null : cell.textContent;
    const number = Number(given);
    return Number.isNaN(number) ? given : number;
  };
  const order = (a, b) =>
    typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
  const sort = (heading) => {
    const table = heading.closest("table");
    const numeric = heading.classList.contains("number");
    const before = heading.getAttribute("aria-sort");
    const way = before ? (before === "ascending" ? "descending" : "ascending") : numeric ? "descending" : "ascending";
    for (const other of all("thead th", table)) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", way);
    const sign = way === "ascending" ? 1 : -1;
    const keyed = [...table.tBodies[0].rows].map((row) => ({ row, key: key(row, heading.cellIndex) }));
    keyed.sort((a, b) => {
      if (a.key === null || b.key === null) return (a.key === null) - (b.key === null);
      return sign * order(a.key, b.key);
    });
    table.tBodies[0].append(...keyed.map((entry) => entry.row));
  };
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button.sort");
    if (button) sort(button.closest("th"));
  });

  // A link to a run opens it, even where the choice hides it.
  const reveal = () => {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!target) return;
    if (target.hidden) {
      const kinds = (target.dataset.hiding || "").split(" ");
      for (const box of all("input[name=kind]")) if (kinds.includes(box.value)) box.checked = true;
      for (const field of all("#search, #dataset, #method")) field.value = "";
      apply();
    }
    if (target.tagName === "DETAILS") target.open = true;
    target.scrollIntoView({ behavior: "instant" });
  };
  window.addEventListener("hashchange", reveal);
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[href^='#']");
    if (link && link.getAttribute("href") === location.hash) reveal(); // the same link once more
  });

  // What a point of a plot is, under the pointer or the keyboard's focus.
  const tip = one("#tip");
  let shown = null;
  const hide = () => { shown = null; tip.hidden = true; };
  const show = (mark) => {
    shown = mark;
    tip.textContent = mark.dataset.tip;
    tip.hidden = false;
    const box = mark.querySelector(".dot").getBoundingClientRect();
    const own = tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, box.left + box.width / 2 - own.width / 2), innerWidth - own.width - 8);
    const above = box.top - own.height - 8;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > 4 ? above : box.bottom + 8}px`;
  };
  for (const mark of all(".mark")) {
    // the browser's own tooltip would come on top; without a script it stays
    mark.querySelector("title").remove();
    for (const name of ["pointerenter", "focus"]) mark.addEventListener(name, () => show(mark));
    for (const name of ["pointerleave", "blur"]) mark.addEventListener(name, hide);
  }
  // the keyboard's focus scrolls its point into view
  window.addEventListener("scroll", () => { if (shown) show(shown); }, { passive: true });

  apply();
  reveal();
})();
