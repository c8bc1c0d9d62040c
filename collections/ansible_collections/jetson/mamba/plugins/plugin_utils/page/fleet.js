"use strict";
// The page is whole without this. It adds: search, filters, sorting, one device at a time, keys.
// Stands in the head, so that the browser never lays out the pages of all devices at once.
document.documentElement.classList.add("js");
document.addEventListener("DOMContentLoaded", () => {
  const root = document.documentElement;
  const table = document.getElementById("hosts");
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  const tools = document.getElementById("tools");
  const search = document.getElementById("search");
  const kind = document.getElementById("class");
  const shown = document.getElementById("shown");
  const buttons = Array.from(tools.querySelectorAll("button[data-state]"));
  const linkOf = (row) => row.cells[0].firstElementChild;
  tools.hidden = false;

  // --- filter ---
  let words = null; // host page texts, read at the first search
  const textOf = (row) => {
    const page = document.getElementById(linkOf(row).hash.slice(1));
    return (row.dataset.class + "\n" + page.textContent).toLowerCase();
  };
  let state = "";
  const filter = () => {
    const asked = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    if (asked.length && !words) words = new Map(rows.map((row) => [row, textOf(row)]));
    let number = 0;
    for (const row of rows) {
      const fits =
        (!state || row.dataset.state === state) &&
        (!kind || !kind.value || row.dataset.class === kind.value) &&
        asked.every((word) => words.get(row).includes(word));
      row.hidden = !fits;
      number += fits;
    }
    shown.textContent = number + " of " + rows.length + " hosts shown";
  };
  search.addEventListener("input", filter);
  if (kind) kind.addEventListener("change", filter);
  tools.addEventListener("submit", (event) => event.preventDefault());
  for (const button of buttons) {
    button.addEventListener("click", () => {
      state = button.dataset.state;
      for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
      filter();
    });
  }

  // --- sort: failed first, then what is not proven ---
  const ORDER = ["failed", "not verified", "busy", "not tested: busy", "incomplete", "not run", "no result", "builder", "passed"];
  const natural = new Intl.Collator("en", { numeric: true, sensitivity: "base" });
  const KEYS = {
    status: (cell) => ORDER.indexOf(cell.dataset.state || cell.textContent),
    number: (cell) => -Number(cell.dataset.number),
    text: (cell) => cell.textContent,
  };
  const heads = Array.from(table.tHead.rows[0].cells);
  heads.forEach((head, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const back = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", back ? "descending" : "ascending");
      const key = KEYS[head.dataset.sort];
      const keyed = rows.map((row) => [key(row.cells[index]), row]);
      const compare = head.dataset.sort === "text" ? natural.compare : (a, b) => a - b;
      keyed.sort((a, b) => (back ? -1 : 1) * compare(a[0], b[0]));
      rows.splice(0, rows.length, ...keyed.map((pair) => pair[1]));
      body.append(...rows);
    });
  });

  // --- one device at a time ---
  let from = null; // where the reader was
  const show = () => {
    const page = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    const device = page && page.classList.contains("device") ? page : null;
    const before = document.querySelector(".device.open");
    if (before) before.classList.remove("open");
    root.classList.toggle("one", Boolean(device));
    if (device) {
      device.classList.add("open");
      window.scrollTo(0, 0);
      device.querySelector("h2").focus({ preventScroll: true });
    } else if (before) {
      if (from) window.scrollTo(0, from.top);
      const link = from && from.link.isConnected ? from.link : table;
      link.focus({ preventScroll: Boolean(from) });
      from = null;
    }
  };
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[href^='#']");
    if (link && !root.classList.contains("one")) from = { link, top: window.scrollY };
  });
  window.addEventListener("hashchange", show);

  // --- keys: / searches, Escape goes back, arrows move among the hosts ---
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const typing = event.target.matches("input, select, textarea");
    if (event.key === "/" && !typing) {
      event.preventDefault();
      if (root.classList.contains("one")) location.hash = "matrix";
      requestAnimationFrame(() => search.focus());
    } else if (event.key === "Escape" && root.classList.contains("one")) {
      location.hash = "matrix";
    } else if (event.key === "Escape" && event.target === search) {
      search.value = "";
      filter();
    } else if ((event.key === "ArrowDown" || event.key === "ArrowUp") && event.target.closest("tbody th a")) {
      const visible = rows.filter((row) => !row.hidden);
      const at = visible.indexOf(event.target.closest("tr")) + (event.key === "ArrowDown" ? 1 : -1);
      if (visible[at]) {
        event.preventDefault();
        linkOf(visible[at]).focus();
      }
    }
  });
  filter();
  show();
});
