// The page's curves and sliders. All numbers and pictures stand in the element #data.
"use strict";
(() => {
  const content = JSON.parse(document.getElementById("data").textContent);
  const element = (id) => document.getElementById(id);
  const color = (name) =>
    getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const COLORS = 8;
  const DASHES = [[], [8, 4], [2, 4]]; // Runs differ in their dashes, too, not in colour alone.
  const MOVES = new Set(["mousemove", "mouseleave"]); // What charts of a group do together.
  const BORDERS = ["solid", "dashed", "dotted"];
  const HEIGHT = 260;
  const PAPER = 400; // Pixels of a chart in print, two beside each other.

  // --- curves ---

  const charts = new Map(); // id -> {spec, plot}
  const state = { weight: 0, logarithmic: false, from: null, to: null };
  let onPaper = false;

  // The exponential average of the values so far, without the pull of its start.
  function smoothed(values, weight) {
    let sum = 0;
    let total = 0;
    return values.map((value) => {
      if (value === null || value === undefined) return value;
      sum = weight * sum + (1 - weight) * value;
      total = weight * total + (1 - weight);
      return sum / total;
    });
  }

  function isLogarithmic(spec) {
    return spec.logarithmic || (spec.group === "training" && spec.positive && state.logarithmic);
  }

  // A logarithmic axis has no place for what is not positive.
  const drawable = (values, log) => (log ? values.map((y) => (y > 0 ? y : null)) : values);

  function dataOf(spec, weight, log) {
    const tables = [];
    for (const line of spec.lines) {
      tables.push([line.x, drawable(line.y, log)]);
      if (weight > 0) tables.push([line.x, drawable(smoothed(line.y, weight), log)]);
    }
    return tables.length > 1 ? uPlot.join(tables) : tables[0];
  }

  const shown = (value) =>
    value === null || value === undefined ? "–" : String(Number(value.toPrecision(5)));

  function seriesOf(spec, weight) {
    const series = [{ label: spec.xlabel, value: (plot, x) => shown(x) }];
    for (const line of spec.lines) {
      const stroke = color(`--run-${line.run % COLORS}`);
      const common = {
        value: (plot, y) => shown(y),
        dash: DASHES[(line.run + line.dash) % DASHES.length],
        points: { fill: color("--back") },
        spanGaps: true,
      };
      const faint = weight > 0;
      series.push({ ...common, label: line.label, stroke, width: faint ? 1 : 2, alpha: faint ? 0.35 : 1 });
      if (faint) series.push({ ...common, label: `${line.label}, smoothed`, stroke, width: 2 });
    }
    return series;
  }

  function axesOf(spec) {
    const common = {
      stroke: color("--quiet"),
      grid: { stroke: color("--line"), width: 1 },
      ticks: { stroke: color("--line"), width: 1 },
      font: "12px system-ui, sans-serif",
      labelFont: "12px system-ui, sans-serif",
      labelSize: 20,
    };
    const label = (plot, values) => values.map((value) => (value === null ? "" : shown(value)));
    return [
      { ...common, label: spec.xlabel },
      {
        ...common,
        label: spec.ylabel,
        // As wide as the longest number, and the label.
        size: (plot, words) => 30 + 8 * Math.max(4, ...(words || []).map((word) => word.length)),
        values: label,
        ...(isLogarithmic(spec) && {
          grid: { ...common.grid, filter: tens },
          ticks: { ...common.ticks, filter: tens },
        }),
      },
    ];
  }

  const widened = (plot, low, high) => (low === high ? [low - 1, high + 1] : [low, high]);

  // Lines at 1, 10, 100 alone: those between would make a grey field of a long axis.
  const tens = (plot, splits) =>
    splits.map((value) => (value > 0 && Math.abs(Math.log10(value) % 1) < 1e-9 ? value : null));

  // The steps of all training curves together, so that they stand below each other.
  const steps = content.charts
    .filter((spec) => spec.group === "training")
    .flatMap((spec) => spec.lines.flatMap((line) => [line.x[0], line.x[line.x.length - 1]]));
  const wholeRun = [Math.min(...steps), Math.max(...steps)];

  function draw(spec) {
    const place = element(spec.id);
    const before = charts.get(spec.id);
    const kept = before && before.zoomed ? before.zoomed : null;
    if (before) before.plot.destroy();
    const log = isLogarithmic(spec);
    const weight = spec.group === "training" ? state.weight : 0;
    const options = {
      width: onPaper ? PAPER : Math.max(place.clientWidth, 200),
      height: HEIGHT,
      series: seriesOf(spec, weight),
      axes: axesOf(spec),
      scales: { x: { time: false, range: widened }, y: { distr: log ? 3 : 1 } },
      legend: {
        markers: {
          dash: (plot, i) => {
            const line = spec.lines[Math.floor((i - 1) / (weight > 0 ? 2 : 1))];
            return line ? BORDERS[(line.run + line.dash) % BORDERS.length] : "solid";
          },
        },
      },
      cursor: {
        drag: { x: true, y: false, setScale: false },
        // A run without a value at this step shows none, rather than that of another step.
        dataIdx: (plot, i, nearest) => nearest,
        points: { fill: (plot, i) => plot.series[i].stroke(plot, i) },
        bind: { dblclick: () => () => zoomFrom(spec, null, null) },
        sync: spec.group ? { key: spec.group, filters: { pub: (type) => MOVES.has(type) } } : undefined,
      },
      hooks: { setSelect: [(plot) => dragged(spec, plot)] },
    };
    const plot = new uPlot(options, dataOf(spec, weight, log), place);
    const chart = { spec, plot, zoomed: null };
    charts.set(spec.id, chart);
    if (spec.group === "training") zoom(chart, state.from, state.to);
    else if (kept) zoom(chart, kept[0], kept[1]);
  }

  function extent(chart) {
    const x = chart.plot.data[0];
    const own = [x[0], x[x.length - 1]];
    const [low, high] = chart.spec.group === "training" ? wholeRun : own;
    return widened(null, low, high);
  }

  // Shows x from `from` to `to`; all of it where they are null.
  function zoom(chart, from, to) {
    const [min, max] = from === null ? extent(chart) : [from, to];
    chart.plot.setScale("x", { min, max });
    chart.zoomed = from === null ? null : [from, to];
  }

  function zoomFrom(spec, from, to) {
    if (spec.group === "training") zoomTraining(from, to);
    else zoom(charts.get(spec.id), from, to);
  }

  function dragged(spec, plot) {
    const { left, width } = plot.select;
    if (width < 3) return; // A click.
    const [from, to] = [left, left + width].map((pixel) => plot.posToVal(pixel, "x"));
    plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    zoomFrom(spec, from, to);
  }

  function trainingCharts() {
    return [...charts.values()].filter((chart) => chart.spec.group === "training");
  }

  function zoomTraining(from, to) {
    state.from = from;
    state.to = to;
    for (const chart of trainingCharts()) zoom(chart, from, to);
    if (element("from-step")) {
      element("from-step").value = Math.round(from === null ? 0 : from);
      element("to-step").value = Math.round(to === null ? element("to-step").max : to);
    }
  }

  function redraw() {
    for (const spec of content.charts) draw(spec);
  }

  function connectControls() {
    const smoothing = element("smoothing");
    if (!smoothing) return;
    smoothing.addEventListener("input", () => {
      state.weight = Number(smoothing.value);
      element("smoothing-value").textContent = state.weight ? state.weight.toFixed(2) : "none";
      for (const chart of trainingCharts()) draw(chart.spec);
    });
    element("logarithmic").addEventListener("change", (event) => {
      state.logarithmic = event.target.checked;
      for (const chart of trainingCharts()) draw(chart.spec);
    });
    const typed = () => {
      const from = Number(element("from-step").value);
      const to = Number(element("to-step").value);
      if (from < to) zoomTraining(from, to);
    };
    element("from-step").addEventListener("change", typed);
    element("to-step").addEventListener("change", typed);
    element("whole-run").addEventListener("click", () => zoomTraining(null, null));
  }

  // --- sliders ---

  function connectSlider(slider) {
    const range = element(`${slider.id}-range`);
    if (!range) return; // There is one picture alone.
    for (const show of slider.shows) show.uris[show.here] = element(show.img).src;
    const turn = () => {
      const position = Number(range.value);
      const words = slider.positions[position];
      range.setAttribute("aria-valuetext", words);
      element(`${slider.id}-position`).textContent = words;
      for (const show of slider.shows) {
        const image = element(show.img);
        const frame = show.frames[position];
        image.classList.toggle("none", frame === null);
        image.alt = frame === null ? "none yet" : show.alts[frame];
        if (frame !== null) image.src = show.uris[frame];
      }
    };
    range.addEventListener("input", turn);
    connectPlay(slider, range, turn);
  }

  function connectPlay(slider, range, turn) {
    const button = element(`${slider.id}-play`);
    let timer = null;
    const stop = () => {
      clearInterval(timer);
      timer = null;
      button.textContent = "Play";
    };
    const step = () => {
      if (Number(range.value) >= Number(range.max)) return stop();
      range.value = Number(range.value) + 1;
      turn();
    };
    button.addEventListener("click", () => {
      if (timer !== null) return stop();
      if (Number(range.value) >= Number(range.max)) {
        range.value = 0;
        turn();
      }
      button.textContent = "Stop";
      const positions = Number(range.max) + 1;
      timer = setInterval(step, Math.min(600, Math.max(80, 6000 / positions)));
    });
    range.addEventListener("pointerdown", () => timer !== null && stop());
  }

  // --- width, colours and paper ---

  function follow() {
    const observer = new ResizeObserver((entries) => {
      if (onPaper) return;
      for (const entry of entries) {
        const chart = charts.get(entry.target.id);
        const width = Math.floor(entry.contentRect.width);
        if (chart && width > 0 && width !== chart.plot.width) chart.plot.setSize({ width, height: HEIGHT });
      }
    });
    for (const spec of content.charts) observer.observe(element(spec.id));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  }

  function print() {
    const root = document.documentElement;
    window.addEventListener("beforeprint", () => {
      onPaper = true;
      root.classList.add("light"); // Paper is white.
      redraw();
    });
    window.addEventListener("afterprint", () => {
      onPaper = false;
      root.classList.remove("light");
      redraw();
    });
  }

  connectControls();
  redraw();
  content.sliders.forEach(connectSlider);
  follow();
  print();
  window.report = { charts, state }; // For whoever wants the numbers in the console.
})();
