"use strict";
// Tooltips of marks on hover and focus; a legend entry highlights its series.
(() => {
  const tip = document.getElementById("tip");

  function show(dot) {
    const [series, label, ...facts] = dot.dataset.tip.split("|");
    const title = document.createElement("b");
    title.textContent = `${series}: ${label}`;
    const lines = facts.map((fact) => {
      const line = document.createElement("span");
      line.textContent = fact;
      return line;
    });
    tip.replaceChildren(title, ...lines);
    tip.classList.add("on");
    const at = dot.getBoundingClientRect();
    const left = Math.min(at.right + 10, window.innerWidth - tip.offsetWidth - 8);
    const above = at.top - tip.offsetHeight - 8;
    tip.style.left = `${Math.max(left, 8)}px`;
    tip.style.top = `${above > 8 ? above : at.bottom + 8}px`;
  }

  function hide() {
    tip.classList.remove("on");
  }

  for (const dot of document.querySelectorAll("[data-tip]")) {
    dot.addEventListener("pointerenter", () => show(dot));
    dot.addEventListener("pointerleave", hide);
    dot.addEventListener("focus", () => show(dot));
    dot.addEventListener("blur", hide);
  }
  window.addEventListener("scroll", hide, { passive: true });

  for (const entry of document.querySelectorAll(".legend [data-series]")) {
    const chart = entry.closest(".card").querySelector(".chart");
    const name = entry.dataset.series;
    entry.addEventListener("pointerenter", () => {
      chart.classList.add("dim");
      for (const series of chart.querySelectorAll(".series")) {
        series.classList.toggle("lit", series.dataset.series === name);
      }
    });
    entry.addEventListener("pointerleave", () => chart.classList.remove("dim"));
  }
  document.documentElement.dataset.ready = "yes";
})();
