"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // Tabs: without this program the links lead to sections that are all there
  const nav = document.querySelector("nav");
  const tabs = all("a", nav);
  const panelOf = (tab) => document.getElementById(tab.hash.slice(1));
  const select = (tab) => {
    for (const each of tabs) {
      const chosen = each === tab;
      each.setAttribute("aria-selected", String(chosen));
      each.tabIndex = chosen ? 0 : -1;
      panelOf(each).hidden = !chosen;
    }
  };
  const target = () => document.getElementById(location.hash.slice(1));
  const named = () => tabs.find((tab) => panelOf(tab).contains(target()));
  const follow = () => {
    select(named() || tabs[0]);
    if (named() && panelOf(named()) !== target()) target().scrollIntoView();
  };
  document.body.classList.add("tabs");
  nav.setAttribute("role", "tablist");
  tabs.forEach((tab, index) => {
    const panel = panelOf(tab);
    tab.id = `tab-${panel.id}`;
    tab.setAttribute("role", "tab");
    tab.setAttribute("aria-controls", panel.id);
    panel.setAttribute("role", "tabpanel");
    panel.setAttribute("aria-labelledby", tab.id);
    tab.addEventListener("click", (event) => {
      event.preventDefault();
      history.replaceState(null, "", tab.hash);
      select(tab);
    });
    tab.addEventListener("keydown", (event) => {
      const places = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: tabs.length - 1 };
      if (event.key === " ") {
        event.preventDefault();
        tab.click();
      } else if (event.key in places) {
        event.preventDefault();
        const next = tabs[(places[event.key] + tabs.length) % tabs.length];
        next.click();
        next.focus();
      }
    });
  });
  follow();
  addEventListener("hashchange", follow);

  // Tables: a click on a header sorts, the second one the other way round; what is not there stays last
  const compare = (a, b) => {
    const [x, y] = [Number(a), Number(b)];
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, undefined, { numeric: true }) : x - y;
  };
  for (const table of all("table.sortable")) {
    const headers = all("thead th", table);
    const body = table.tBodies[0];
    headers.forEach((header, column) => {
      const button = document.createElement("button");
      button.append(...header.childNodes);
      header.append(button);
      button.addEventListener("click", () => {
        const first = column === 0 || table.classList.contains("settings") ? "ascending" : "descending";
        const other = first === "ascending" ? "descending" : "ascending";
        const order = header.getAttribute("aria-sort") === first ? other : first;
        headers.forEach((each) => each.removeAttribute("aria-sort"));
        header.setAttribute("aria-sort", order);
        const key = (row) => row.cells[column].dataset.sort;
        const sign = order === "ascending" ? 1 : -1;
        const rows = [...body.rows].sort(
          (a, b) => (key(a) === "") - (key(b) === "") || sign * compare(key(a), key(b)),
        );
        body.append(...rows);
      });
    });
  }

  // Curves: runs can be hidden, and the values under the pointer are told
  for (const run of all(".runs .run")) {
    const button = document.createElement("button");
    button.append(...run.childNodes);
    button.setAttribute("aria-pressed", "true");
    run.append(button);
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") === "false";
      button.setAttribute("aria-pressed", String(shown));
      all(`.panel [data-run="${run.dataset.run}"]`).forEach((part) => part.classList.toggle("off", !shown));
    });
  }
  const points = JSON.parse(document.getElementById("points").textContent);
  const written = (value) => String(Number(value.toPrecision(4)));
  for (const figure of all(".panel")) {
    const { x, scale, curves } = points[Number(figure.dataset.panel)];
    const svg = figure.querySelector("svg");
    const [, , side] = svg.getAttribute("viewBox").split(" ").map(Number);
    const at = figure.querySelector(".at");
    if (at === null) continue;
    const outputs = all("output", figure);
    const last = outputs.map((output) => output.value);
    const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
    line.setAttribute("class", "pointer");
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const wanted = x[0] + ((event.clientX - box.left) / box.width) * (x[1] - x[0]);
      const distance = (point) => Math.abs(point[0] - wanted);
      const nearest = curves.map(([, known]) => known.reduce((a, b) => (distance(b) < distance(a) ? b : a)));
      const place = nearest.reduce((a, b) => (distance(b) < distance(a) ? b : a))[0];
      nearest.forEach((point, index) => {
        outputs[index].value = written(point[1] * scale);
      });
      at.textContent = `at ${place.toLocaleString("en")}`;
      line.setAttribute("d", `M${(side * (place - x[0])) / (x[1] - x[0])} 0V${side}`);
      svg.append(line);
    });
    svg.addEventListener("pointerleave", () => {
      outputs.forEach((output, index) => {
        output.value = last[index];
      });
      at.textContent = "";
      line.remove();
    });
  }

  // Pictures: a click enlarges
  const dialog = document.getElementById("enlarged");
  const [large, caption] = [dialog.querySelector("img"), dialog.querySelector("p")];
  for (const image of all(".pictures img")) {
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-label", `Enlarge: ${image.alt}`);
    image.replaceWith(button);
    button.append(image);
    button.addEventListener("click", () => {
      large.src = image.src;
      large.alt = image.alt;
      caption.textContent = image.alt;
      dialog.showModal();
    });
  }
  large.addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
})();
