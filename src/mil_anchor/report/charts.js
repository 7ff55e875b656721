// Curves: a panel for each data set and model, a colour for each plug-in.
"use strict";

{
  // Attention that does not move at all still gives divergences of this order, by rounding.
  const ROUNDING = 1e-7;
  const DASHES = { solid: "solid", dashed: "dash", dotted: "dot", dashdot: "dashdot" };
  const switchedOff = new Set();

  const colorOf = (plugin) =>
    report.colors[darkMode.matches ? "dark" : "light"][report.plugins[plugin].color];
  const lineOf = (plugin, width) => ({
    color: colorOf(plugin),
    dash: DASHES[report.plugins[plugin].dash],
    width,
  });
  // Plotly reads some markup in names.
  const plain = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
  const shortened = (number) => Number(number.toPrecision(3)).toString();
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

  function groups(items, key) {
    const found = new Map();
    for (const item of items) {
      if (!found.has(key(item))) found.set(key(item), []);
      found.get(key(item)).push(item);
    }
    return found;
  }

  function meanCurve(curves) {
    const length = Math.max(...curves.map((curve) => curve.length));
    return Array.from({ length }, (_, epoch) => {
      const known = curves.map((curve) => curve[epoch] ?? null).filter((value) => value !== null);
      return known.length ? mean(known) : null;
    });
  }

  // Lines by epoch: of every run, and above them of the mean over each plug-in's runs.
  function curveTraces(kind, runs, measure) {
    const thin = [];
    const thick = [];
    for (const [plugin, members] of groups(runs, (run) => run.plugin)) {
      const floored = (curve) =>
        measure.log ? curve.map((y) => (y === null ? null : Math.max(y, ROUNDING))) : curve;
      const trace = (curve, width, opacity, name) => ({
        type: "scatter",
        // A line of one epoch has no length.
        mode: curve.filter((y) => y !== null).length > 1 ? "lines" : "markers",
        x: curve.map((_, epoch) => epoch),
        y: floored(curve),
        line: lineOf(plugin, width),
        marker: { color: colorOf(plugin) },
        opacity,
        meta: plain(name),
        hovertemplate: "%{meta}<br>epoch %{x}: %{y:.4g}<extra></extra>",
      });
      const curves = members.map((run) => run[kind][measure.key]);
      if (curves.length === 1) {
        thick.push(trace(curves[0], 2, 1, `${plugin}, ${members[0].draw}`));
        continue;
      }
      members.forEach((run, index) => {
        thin.push(trace(curves[index], 1, 0.45, `${plugin}, ${run.draw}`));
      });
      thick.push(trace(meanCurve(curves), 2.5, 1, `${plugin}, mean of ${curves.length} runs`));
    }
    return [...thin, ...thick];
  }

  // Dots for the bins of every run; a line for the mean over a plug-in's runs with bags in a bin.
  function reliabilityTraces(runs) {
    const dots = [];
    const lines = [
      {
        type: "scatter",
        mode: "lines",
        x: [0, 1],
        y: [0, 1],
        line: { color: theme("--muted"), dash: "dash", width: 1 },
        hoverinfo: "skip",
      },
    ];
    for (const [plugin, members] of groups(runs, (run) => run.plugin)) {
      const means = (key) => meanCurve(members.map((run) => run.reliability[key]));
      const [confidence, accuracy] = [means("confidence"), means("accuracy")];
      const filled = accuracy.map((_, bin) => bin).filter((bin) => accuracy[bin] !== null);
      const trace = (x, y, name) => ({
        type: "scatter",
        x,
        y,
        line: lineOf(plugin, 2),
        meta: plain(`${plugin}, ${name}`),
        hovertemplate: "%{meta}<br>sure by %{x:.3f}, right in %{y:.3f}<extra></extra>",
      });
      lines.push({
        ...trace(
          filled.map((bin) => confidence[bin]),
          filled.map((bin) => accuracy[bin]),
          `mean of ${members.length} run(s)`,
        ),
        mode: "lines+markers",
        marker: { color: colorOf(plugin), size: 5 },
      });
      for (const run of members) {
        const { n } = run.reliability;
        dots.push({
          ...trace(run.reliability.confidence, run.reliability.accuracy, run.draw),
          mode: "markers",
          // Empty bins have no place, whatever their size.
          marker: { color: colorOf(plugin), size: n.map((bags) => 4 + 2 * Math.log2(bags || 1)) },
          opacity: 0.3,
          customdata: n,
          hovertemplate:
            "%{meta}, %{customdata} bags<br>sure by %{x:.3f}, right in %{y:.3f}<extra></extra>",
        });
      }
    }
    return [...dots, ...lines];
  }

  const theme = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function layout(xaxis, yaxis) {
    const axis = {
      gridcolor: theme("--line"),
      linecolor: theme("--muted"),
      zeroline: false,
      automargin: true,
    };
    return {
      height: 270,
      margin: { l: 10, r: 10, t: 8, b: 10 },
      paper_bgcolor: "transparent",
      plot_bgcolor: "transparent",
      font: { color: theme("--ink"), family: theme("--font"), size: 12 },
      hovermode: "closest",
      hoverlabel: { bgcolor: theme("--surface"), font: { color: theme("--ink") } },
      showlegend: false,
      xaxis: { ...axis, ...xaxis },
      yaxis: { ...axis, ...yaxis },
    };
  }

  // The same axis for all models of a data set, so that they can be compared.
  function sharedRange(kind, runs, measure) {
    const known = runs
      .flatMap((run) => run[kind][measure.key])
      .filter((value) => value !== null)
      .map((value) => (measure.log ? Math.log10(Math.max(value, ROUNDING)) : value));
    const [low, high] = known.reduce(
      ([least, most], value) => [Math.min(least, value), Math.max(most, value)],
      [Infinity, -Infinity],
    );
    const room = 0.05 * (high - low) || Math.abs(high) * 0.05 || 0.05;
    return [low - room, high + room];
  }

  // Which plug-ins are drawn: the same boxes stand above all curves.
  function pluginBoxes() {
    const boxes = element("fieldset", { class: "plugins" }, element("legend", {}, "plug-ins"));
    for (const plugin of Object.keys(report.plugins)) {
      const box = element("input", { type: "checkbox", "data-plugin": plugin });
      box.checked = true;
      box.addEventListener("change", () => {
        if (box.checked) switchedOff.delete(plugin);
        else switchedOff.add(plugin);
        announceChoice();
      });
      const swatch = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      swatch.setAttribute("viewBox", "0 0 28 4");
      swatch.setAttribute("aria-hidden", "true");
      swatch.innerHTML = '<line x1="0" y1="2" x2="28" y2="2" stroke-width="4"/>';
      const label = element("label", {}, box, swatch, plugin);
      const paint = () => {
        const dashes = { solid: "", dashed: "7 3", dotted: "3 3", dashdot: "7 3 2 3" };
        swatch.firstChild.setAttribute("stroke", colorOf(plugin));
        swatch.firstChild.setAttribute("stroke-dasharray", dashes[report.plugins[plugin].dash]);
        box.checked = !switchedOff.has(plugin);
        label.hidden = !isChosen({ plugin });
      };
      darkMode.addEventListener("change", paint);
      onChoice(paint);
      boxes.append(label);
    }
    return boxes;
  }

  // In words, for who cannot see the panel.
  function described(kind, runs, measure) {
    const parts = [];
    for (const [plugin, members] of groups(runs, (run) => run.plugin)) {
      const values = members.map((run) =>
        kind === "reliability" ? run.reliability.error : run[kind][measure.key].at(-1),
      );
      const known = values.filter((value) => value !== null);
      if (known.length) parts.push(`${plugin} ${shortened(mean(known))}`);
    }
    return parts.join(", ");
  }

  function panel(kind, runs, measure, range) {
    const [{ data, model }] = runs;
    const words = described(kind, runs, measure);
    const what =
      kind === "reliability"
        ? `Reliability of ${model} on ${data}. Mean ECE: ${words}`
        : `${measure.label} by epoch, ${model} on ${data}. Last epoch, mean of runs: ${words}`;
    const plot = element("div", { class: "plot", role: "img", "aria-label": what });
    const made = element("figure", {}, element("figcaption", {}, `${model} on ${data}`), plot);
    if (kind === "reliability") made.append(element("p", { class: "note" }, `ECE: ${words}`));
    plot.draw = () => {
      const [traces, axes] =
        kind === "reliability"
          ? [
              reliabilityTraces(runs),
              layout(
                { title: { text: "probability of the predicted class" }, range: [0, 1.03] },
                { title: { text: "share that is right" }, range: [-0.03, 1.03] },
              ),
            ]
          : [
              curveTraces(kind, runs, measure),
              layout(
                { title: { text: "epoch" }, tickformat: "d" },
                {
                  title: { text: measure.label },
                  range,
                  ...(measure.log ? { type: "log", exponentformat: "power", dtick: 1 } : {}),
                },
              ),
            ];
      Plotly.react(plot, traces, axes, { displayModeBar: false, responsive: true });
    };
    return made;
  }

  // Panels are drawn when they come near: a page of many runs has hundreds of them.
  const near = new IntersectionObserver(
    (entries) => {
      for (const entry of entries.filter((own) => own.isIntersecting)) {
        near.unobserve(entry.target);
        entry.target.draw();
        entry.target.isDrawn = true;
      }
    },
    { rootMargin: "400px" },
  );

  function charts(section) {
    const kind = section.id;
    const has = (run, measure) =>
      kind === "reliability" ? run.reliability !== null : run[kind]?.[measure.key] !== undefined;
    const measures = (report.measures[kind] ?? [{}]).filter((measure) =>
      report.runs.some((run) => has(run, measure)),
    );
    const panels = section.querySelector(".panels");
    if (!measures.length || !report.runs.some((run) => has(run, measures[0]))) {
      panels.append(element("p", { class: "none" }, "No run has kept what this would show."));
      return;
    }
    const measured = select(measures.map((measure, index) => [index, measure.label]));
    const controls = section.querySelector(".controls");
    if (kind !== "reliability") controls.append(labelled("measure", measured));
    controls.append(pluginBoxes());

    function build() {
      for (const plot of panels.querySelectorAll(".plot")) {
        near.unobserve(plot);
        if (plot.isDrawn) Plotly.purge(plot);
      }
      const measure = measures[Number(measured.value)] ?? measures[0];
      const shown = report.runs.filter(
        (run) => isChosen(run) && !switchedOff.has(run.plugin) && has(run, measure),
      );
      panels.replaceChildren();
      for (const ofData of groups(shown, (run) => run.data).values()) {
        const range = kind === "reliability" ? null : sharedRange(kind, ofData, measure);
        for (const runs of groups(ofData, (run) => run.model).values()) {
          panels.append(panel(kind, runs, measure, range));
        }
      }
      if (!shown.length) {
        panels.append(element("p", { class: "none" }, "No run is left by the filters."));
      }
      for (const plot of panels.querySelectorAll(".plot")) near.observe(plot);
    }
    measured.addEventListener("change", build);
    darkMode.addEventListener("change", build);
    onChoice(build);
  }

  for (const section of document.querySelectorAll("section.charts")) charts(section);
}
