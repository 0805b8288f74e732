// What moves on a report: curves (drawn by Vega) and the table of answers. Data and words stand in the page as JSON; they
// are only ever set as text, and an image's address is always embedded data.
const given = id => JSON.parse(document.getElementById(id)?.textContent ?? "null");
const words = given("words"), curves = given("curves") ?? [], answers = given("answers");

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes))
    if (name in element && name !== "list") element[name] = value;
    else element.setAttribute(name, value);
  element.append(...children.filter(child => child !== null));
  return element;
}

const figure = value => value === null ? "–" : Number(value.toPrecision(4)).toLocaleString("en", { maximumFractionDigits: 20 });

// --- curves

// An exponential moving average that starts at the first value, as TensorBoard's does.
function smoothed(points, weight) {
  let sum = 0, scale = 0;
  return points.map(([x, y]) => {
    sum = weight * sum + (1 - weight) * y;
    scale = weight * scale + 1 - weight;
    return [x, sum / scale];
  });
}

function rows(curve, weight) {
  return curve.series.flatMap((series, number) => {
    const smooth = weight && !series.dots ? smoothed(series.points, weight) : series.points;
    const few = series.dots || series.points.length < 30;
    return smooth.map(([x, y], i) => (
      { x, y, raw: series.points[i][1], series: number, color: `var(--c${series.color})`, dash: series.dash ? [5, 3] : [1, 0], few }
    ));
  });
}

function specification(rows, log, smooth) {
  const line = (name, y, opacity, width) => ({
    type: "line", from: { data: name },
    encode: { update: {
      x: { scale: "x", field: "x" }, y: { scale: "y", field: y }, stroke: { field: "color" }, strokeDash: { field: "dash" },
      strokeOpacity: { value: opacity }, strokeWidth: { value: width },
    } },
  });
  const dots = (test, size) => ({
    type: "symbol", from: { data: "rows" },
    encode: { update: {
      x: { scale: "x", field: "x" }, y: { scale: "y", field: "y" }, fill: { field: "color" }, size: { value: size },
      opacity: { signal: `${test} ? 1 : 0` },
    } },
  });
  const each = marks => ({
    type: "group", from: { facet: { name: "one", data: "rows", groupby: "series" } }, marks,
  });
  const axis = { domainColor: "var(--line)", tickColor: "var(--line)", gridColor: "var(--line)", labelColor: "var(--soft)",
    labelFont: "inherit", labelFontSize: 11, ticks: false, labelPadding: 6, labelOverlap: "greedy", labelSeparation: 6,
    encode: { labels: { update: { text: { signal: "format(datum.value, abs(datum.value) >= 1000 ? '~s' : '~r')" } } } } };
  return {
    autosize: { type: "fit", contains: "padding" }, height: 230, padding: 2,
    signals: [{ name: "at", value: null }],
    data: [{ name: "rows", values: rows }],
    scales: [
      { name: "x", type: "linear", range: "width", domain: { data: "rows", field: "x" }, zero: true, nice: false },
      { name: "y", type: log ? "log" : "linear", range: "height", nice: true, ...(log ? {} : { zero: false }),
        domain: { data: "rows", fields: smooth ? ["y", "raw"] : ["y"] } },
    ],
    axes: [
      { ...axis, orient: "bottom", scale: "x", tickCount: { signal: "ceil(width / 80)" }, tickMinStep: 1, labelFlush: true },
      { ...axis, orient: "left", scale: "y", grid: true, domain: false, tickCount: 5 },
    ],
    marks: [
      { type: "rule", encode: { update: {
        x: { scale: "x", signal: "at" }, y: { value: 0 }, y2: { signal: "height" }, stroke: { value: "var(--soft)" },
        opacity: { signal: "at === null ? 0 : 1" } } } },
      each([...(smooth ? [line("one", "raw", 0.25, 1)] : []), line("one", "y", 1, 1.8)]),
      dots("datum.few", 26), dots("datum.x === at", 60),
    ],
  };
}

function chart(curve, box) {
  const plot = make("div", { className: "plot", tabIndex: 0, role: "img", "aria-label": `${curve.title}. ${words.keys}` });
  const said = make("p", { className: "facts", role: "status" });
  const legend = make("p", { className: "legend" }, ...(curve.series.length < 2 ? [] : curve.series.map(series => {
    const swatch = make("i", { className: series.dash ? "dashed" : "" });
    swatch.style.setProperty("--colour", `var(--c${series.color})`);
    return make("span", {}, swatch, series.name);
  })));
  box.append(plot, legend, said);
  const steps = [...new Set(curve.series.flatMap(series => series.points.map(point => point[0])))].sort((a, b) => a - b);
  let view = null, shown = [], place = -1;

  function point(index) {
    if (!view) return;
    place = Math.max(0, Math.min(index, steps.length - 1));
    view.signal("at", steps[place]).runAsync();
    const here = shown.filter(row => row.x === steps[place]);
    said.textContent = [`${words.step} ${figure(steps[place])}`, ...here.map(row => {
      const name = curve.series.length < 2 ? "" : `${curve.series[row.series].name} `;
      return `${name}${figure(row.raw)}` + (row.raw === row.y ? "" : ` (${words.smoothed} ${figure(row.y)})`);
    })].join(" · ");
  }
  function leave() {
    place = -1;
    view?.signal("at", null).runAsync();
    said.textContent = curve.facts;
  }
  new ResizeObserver(() => view?.width(plot.clientWidth).runAsync()).observe(plot);
  plot.addEventListener("pointermove", event => {
    if (!view) return;
    const x = view.scale("x").invert(event.clientX - plot.getBoundingClientRect().left - view.origin()[0]);
    point(steps.reduce((best, step, i) => Math.abs(step - x) < Math.abs(steps[best] - x) ? i : best, 0));
  });
  plot.addEventListener("pointerleave", leave);
  plot.addEventListener("blur", leave);
  plot.addEventListener("keydown", event => {
    const to = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: steps.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    point(to);
  });

  async function draw(weight, log) {
    const smoothing = curve.noisy ? weight : 0;
    shown = rows(curve, smoothing);
    const possible = log && curve.log && shown.every(row => row.y > 0 && row.raw > 0);
    const options = { mode: "vega", renderer: "svg", actions: false, tooltip: false, width: plot.clientWidth };
    const earlier = view;
    view = null;
    const drawn = await vegaEmbed(plot, specification(shown, possible, smoothing > 0), options);
    earlier?.finalize();
    view = drawn.view;
    said.textContent = curve.facts;
  }
  // One after the other, and of those that wait the newest alone: an earlier drawing never replaces a later one.
  let drawing = Promise.resolve(), newest = 0;
  return (weight, log) => {
    const mine = ++newest;
    drawing = drawing.then(() => mine === newest ? draw(weight, log) : null).catch(console.error);
    return drawing;
  };
}

if (curves.length) {
  const boxes = document.querySelectorAll("[data-curve]");
  const draw = curves.map((curve, number) => chart(curve, boxes[number]));
  const smoothing = document.getElementById("smoothing"), log = document.getElementById("log");
  const all = () => draw.forEach(one => one(Number(smoothing.value), log.checked));
  smoothing.addEventListener("input", all);
  log.addEventListener("change", all);
  all();
}

// --- answers

const PER_PAGE = 25;
const TESTS = {
  all: () => true, wrong: row => !row.right[0], right: row => row.right[0], cut: row => row.cut.some(Boolean),
  changed: row => row.turns.some(turn => turn.slice(2).some(text => text !== turn[2])),
  better: row => row.right[0] && !row.right[1], worse: row => !row.right[0] && row.right[1],
};

function cells(row) {
  const column = number => row.turns.map(turn => turn[number]).join("\n");
  const mark = number => row.right[number] === null ? "" : row.right[number] ? "✓ " : "✗ ";
  const pictures = row.pictures.map((picture, i) => make("img", {
    src: answers.pictures[picture], alt: `${words.image} ${i + 1}, ${row.id}`, loading: "lazy",
    className: answers.pictures[picture].length < 4000 ? "tiny" : "",
  }));
  const said = answers.models.map((name, number) => make("td", { className: row.right[number] ? "good-text" : "bad-text", "data-label": name },
    make("span", { className: "mark" }, mark(number)), column(2 + number) || words.nothing, row.cut[number] ? ` (${words.cut})` : ""));
  return [
    make("td", { className: "thumbs" }, ...pictures),
    make("td", { "data-label": words.question }, column(0), make("small", {}, row.group === "all" ? row.id : `${row.group} · ${row.id}`)),
    make("td", { "data-label": words.expected }, column(1)), ...said,
  ];
}

if (answers?.rows.length) {
  const [filter, group, search] = ["filter", "group", "search"].map(id => document.getElementById(id));
  const body = document.querySelector("#answers-table tbody"), count = document.getElementById("count");
  const [back, next] = ["back", "next"].map(id => document.getElementById(id));
  const texts = answers.rows.map(row => [row.id, ...row.turns.flat()].join("\n").toLowerCase());
  let page = 0;
  const show = () => {
    const wanted = search.value.trim().toLowerCase();
    const found = answers.rows.filter((row, i) =>
      TESTS[filter.value](row) && (!group?.value || row.group === group.value) && texts[i].includes(wanted));
    const pages = Math.max(1, Math.ceil(found.length / PER_PAGE));
    page = Math.min(page, pages - 1);
    body.replaceChildren(...found.slice(page * PER_PAGE, (page + 1) * PER_PAGE).map(row => make("tr", {}, ...cells(row))));
    count.textContent = words.count.replace("{found}", found.length).replace("{page}", page + 1).replace("{pages}", pages);
    back.disabled = page === 0;
    next.disabled = page === pages - 1;
  };
  const from = step => () => { page = step === 0 ? 0 : page + step; show(); };
  for (const control of [filter, group, search]) control?.addEventListener("input", from(0));
  back.addEventListener("click", from(-1));
  next.addEventListener("click", from(1));
  show();
}
