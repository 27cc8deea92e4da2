"use strict";
// Draws the charts of the report as SVG from the JSON in the page, and lets them be read, zoomed and
// smoothed. Nothing is fetched; text from data is only ever set as text.
(() => {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const byId = (id) => document.getElementById(id);
  const MARGIN = { top: 8, right: 10, bottom: 22, left: 50 };
  const FEW = 24; // points that are drawn as dots, too
  const view = { from: 0, to: 1, smooth: 0, hiddenRuns: new Set(), at: null };
  const charts = [];

  // ------------------------------------------------------------ numbers

  function shown(value) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size !== 0 && size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e");
    const notation = size >= 1e5 ? "compact" : "standard";
    return new Intl.NumberFormat("en", { maximumSignificantDigits: 4, notation }).format(value);
  }

  // Round numbers inside [low, high], about `count` of them.
  function ticks(low, high, count) {
    const rough = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
    const found = [];
    for (let i = Math.ceil(low / step); i * step <= high + step * 1e-9; i++) found.push(i * step + 0); // no -0
    return found;
  }

  // Exponential mean, corrected for its start (as Adam's moments are).
  function smoothed(values, weight) {
    let sum = 0, total = 0;
    return values.map((value) => {
      if (value === null) return null;
      sum = weight * sum + (1 - weight) * value;
      total = weight * total + (1 - weight);
      return sum / total;
    });
  }

  // Index of the point nearest to a step, in ascending steps.
  function nearest(steps, step) {
    let low = 0, high = steps.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] < step) low = middle; else high = middle;
    }
    return step - steps[low] <= steps[high] - step ? low : high;
  }

  // ------------------------------------------------------------ elements

  function svg(name, attributes, parent, text) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    if (parent) parent.append(element);
    return element;
  }

  function html(name, className, parent, text) {
    const element = document.createElement(name);
    element.className = className;
    if (text !== undefined) element.textContent = text;
    parent.append(element);
    return element;
  }

  function path(steps, values, x, y) {
    let text = "", pen = "M";
    values.forEach((value, i) => {
      if (value === null) { pen = "M"; return; }
      text += `${pen}${x(steps[i]).toFixed(1)} ${y(value).toFixed(1)}`;
      pen = "L";
    });
    return text;
  }

  function band(line, x, y) {
    const there = line.s.map((_, i) => i).filter((i) => line.lo[i] !== null);
    const point = (i, side) => `${x(line.s[i]).toFixed(1)} ${y(line[side][i]).toFixed(1)}`;
    const up = there.map((i) => point(i, "hi"));
    const down = there.reverse().map((i) => point(i, "lo"));
    return up.length ? `M${up.join("L")}L${down.join("L")}Z` : "";
  }

  // ------------------------------------------------------------ one chart

  function visible(chart) {
    return chart.lines.filter((line) => !line.hidden && !view.hiddenRuns.has(line.run));
  }

  // Least and most of what is in view, with a little room.
  function range(chart, lines) {
    if (chart.share) return [0, 1];
    let low = Infinity, high = -Infinity;
    for (const line of lines) {
      line.s.forEach((step, i) => {
        if (step < view.from || step > view.to || line.v[i] === null) return;
        low = Math.min(low, (line.lo || line.v)[i]);
        high = Math.max(high, (line.hi || line.v)[i]);
      });
    }
    if (low > high) return [0, 1];
    const room = (high - low) * 0.06 || Math.abs(high) * 0.05 || 0.5;
    return [low - room, high + room];
  }

  function draw(chart) {
    const width = chart.plot.clientWidth, height = chart.plot.clientHeight;
    if (!width || !height) return;
    const lines = visible(chart), root = chart.svg;
    const [low, high] = range(chart, lines);
    const right = width - MARGIN.right, bottom = height - MARGIN.bottom;
    const x = (step) => MARGIN.left + ((step - view.from) / (view.to - view.from)) * (right - MARGIN.left);
    const y = (value) => bottom - ((value - low) / (high - low)) * (bottom - MARGIN.top);
    chart.x = x;
    chart.stepAt = (px) => view.from + ((px - MARGIN.left) / (right - MARGIN.left)) * (view.to - view.from);
    root.setAttribute("viewBox", `0 0 ${width} ${height}`);
    root.replaceChildren();
    const clip = svg("clipPath", { id: `clip-${chart.key}` }, root);
    svg("rect", { x: MARGIN.left - 4, y: 0, width: right - MARGIN.left + 8, height: bottom + 4 }, clip);
    for (const value of ticks(low, high, 5)) {
      const kind = value === 0 && low < 0 ? "zero" : "grid";
      svg("line", { class: kind, x1: MARGIN.left, x2: right, y1: y(value), y2: y(value) }, root);
      svg("text", { x: MARGIN.left - 6, y: y(value) + 4, "text-anchor": "end" }, root, shown(value));
    }
    for (const step of ticks(view.from, view.to, Math.max(3, width / 70))) {
      if (!Number.isInteger(Math.round(step * 1e6) / 1e6)) continue;
      svg("text", { x: x(step), y: height - 5, "text-anchor": "middle" }, root, shown(step));
    }
    const group = svg("g", { "clip-path": `url(#clip-${chart.key})` }, root);
    for (const line of lines) drawLine(line, group, x, y);
    chart.cursor = svg("line", { class: "cursor", y1: MARGIN.top, y2: bottom, visibility: "hidden" }, root);
    chart.selection = svg("rect", { class: "chosen", y: MARGIN.top, height: bottom - MARGIN.top, width: 0 }, root);
  }

  function drawLine(line, group, x, y) {
    const tone = `s${line.colour}`, dashed = line.dashed ? " dashed" : "";
    if (line.lo) svg("path", { class: `band ${tone}`, d: band(line, x, y) }, group);
    let values = line.v;
    // The mean of a few points would hide what they say.
    const smooth = view.smooth > 0 && line.s.length > FEW;
    if (smooth) {
      svg("path", { class: `raw ${tone}`, d: path(line.s, line.v, x, y) }, group);
      values = smoothed(line.v, view.smooth);
    }
    svg("path", { class: `line ${tone}${dashed}`, d: path(line.s, values, x, y) }, group);
    if (line.s.length > FEW) return;
    line.s.forEach((step, i) => {
      if (line.v[i] === null) return;
      const kind = `dot ${tone}${line.dashed ? " open" : ""}`;
      svg("circle", { class: kind, cx: x(step), cy: y(line.v[i]), r: 2.6 }, group);
    });
  }

  // ------------------------------------------------------------ reading values

  // Shows the values at a step in all charts; null puts the last ones back.
  function pointAt(step) {
    view.at = step;
    for (const chart of charts) {
      for (const line of chart.lines) {
        const i = step === null ? line.s.length - 1 : nearest(line.s, step);
        line.value.textContent = shown(line.v[i]);
        line.value.title = line.lo ? `${shown(line.lo[i])} to ${shown(line.hi[i])}` : "";
      }
      if (!chart.cursor) continue;
      const outside = step === null || step < view.from || step > view.to;
      chart.cursor.setAttribute("visibility", outside ? "hidden" : "visible");
      if (!outside) {
        chart.cursor.setAttribute("x1", chart.x(step));
        chart.cursor.setAttribute("x2", chart.x(step));
      }
      describe(chart, step);
    }
  }

  function describe(chart, step) {
    const at = step === null ? chart.steps[chart.steps.length - 1] : step;
    const values = visible(chart).map((line) => `${line.label} ${line.value.textContent}`);
    chart.svg.setAttribute("aria-valuenow", at);
    chart.svg.setAttribute("aria-valuetext", `step ${at}: ${values.join(", ")}`);
    chart.at.textContent = `step ${shownStep(at)}`;
  }

  const shownStep = (step) => new Intl.NumberFormat("en").format(step);

  function listen(chart) {
    const root = chart.svg;
    let began = null;
    const place = (event) => event.clientX - root.getBoundingClientRect().left;
    const stepUnder = (event) => chart.steps[nearest(chart.steps, chart.stepAt(place(event)))];
    root.addEventListener("pointerdown", (event) => {
      if (event.pointerType === "mouse" && event.button === 0) {
        began = place(event);
        root.setPointerCapture(event.pointerId);
      }
      pointAt(stepUnder(event));
    });
    root.addEventListener("pointermove", (event) => {
      pointAt(stepUnder(event));
      if (began === null) return;
      chart.selection.setAttribute("x", Math.min(began, place(event)));
      chart.selection.setAttribute("width", Math.abs(place(event) - began));
    });
    root.addEventListener("pointerup", (event) => {
      if (began === null) return;
      const ends = [began, place(event)].sort((a, b) => a - b);
      began = null;
      chart.selection.setAttribute("width", 0);
      if (ends[1] - ends[0] > 8) zoom(...ends.map(chart.stepAt).map(Math.round));
    });
    root.addEventListener("pointerleave", () => { if (began === null) pointAt(null); });
    root.addEventListener("dblclick", () => zoom(null, null));
    root.addEventListener("blur", () => pointAt(null));
    root.addEventListener("keydown", (event) => {
      const steps = chart.steps.filter((step) => step >= view.from && step <= view.to);
      const now = nearest(steps, Number(root.getAttribute("aria-valuenow")));
      const to = { ArrowLeft: now - 1, ArrowRight: now + 1, PageUp: now + 10, PageDown: now - 10,
        Home: 0, End: steps.length - 1 }[event.key];
      if (event.key === "Escape") zoom(null, null);
      else if (to === undefined || !steps.length) return;
      else pointAt(steps[Math.max(0, Math.min(steps.length - 1, to))]);
      event.preventDefault();
    });
  }

  // ------------------------------------------------------------ all charts

  const everyStep = Object.values(data.charts).flatMap((c) => c.lines.flatMap((l) => l.s));
  const [first, last] = everyStep.reduce(([a, b], s) => [Math.min(a, s), Math.max(b, s)], [Infinity, -Infinity]);

  function zoom(from, to) {
    view.from = Math.max(first, from ?? first);
    view.to = Math.min(last, to ?? last);
    if (!(view.to > view.from)) {
      [view.from, view.to] = first < last ? [first, last] : [first - 1, last + 1];
    }
    byId("from").value = Math.max(first, view.from);
    byId("to").value = Math.min(last, view.to);
    redraw();
  }

  function redraw() {
    charts.forEach(draw);
    pointAt(view.at);
  }

  function build(figure) {
    const key = figure.dataset.chart, chart = { key, figure, ...data.charts[key] };
    chart.plot = figure.querySelector(".plot");
    chart.steps = [...new Set(chart.lines.flatMap((line) => line.s))].sort((a, b) => a - b);
    chart.svg = svg("svg", { role: "slider", tabindex: 0, "aria-label": `${chart.title}, curves over steps`,
      "aria-valuemin": chart.steps[0], "aria-valuemax": chart.steps[chart.steps.length - 1] }, chart.plot);
    const legend = figure.querySelector(".legend");
    for (const line of chart.lines) {
      const button = html("button", "", legend);
      button.type = "button";
      button.setAttribute("aria-pressed", "true");
      html("span", `swatch s${line.colour}${line.dashed ? " dashed" : ""}`, button);
      button.append(line.label);
      line.value = html("span", "value", button);
      button.addEventListener("click", () => {
        line.hidden = !line.hidden;
        button.setAttribute("aria-pressed", String(!line.hidden));
        draw(chart);
        pointAt(view.at);
      });
    }
    chart.at = html("span", "note", legend);
    listen(chart);
    charts.push(chart);
  }

  if (!everyStep.length) return;
  document.querySelectorAll("figure[data-chart]").forEach(build);
  byId("tools").addEventListener("submit", (event) => event.preventDefault());
  byId("smooth").addEventListener("input", (event) => { view.smooth = Number(event.target.value); redraw(); });
  for (const id of ["from", "to"]) {
    byId(id).addEventListener("change", () => zoom(...["from", "to"].map((i) =>
      byId(i).value === "" ? null : Number(byId(i).value))));
  }
  byId("reset").addEventListener("click", () => zoom(null, null));
  for (const box of document.querySelectorAll("input[data-run]")) {
    box.addEventListener("change", () => {
      view.hiddenRuns[box.checked ? "delete" : "add"](Number(box.dataset.run));
      redraw();
    });
  }
  new ResizeObserver(redraw).observe(document.querySelector(".charts"));
  zoom(null, null);
})();
