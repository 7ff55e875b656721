// Heat maps: the plug-ins side by side on one slide, with a slider over the epochs.
"use strict";

{
  const SCALES = {
    percentile: "rank within each map",
    log: "attention times N, one scale for all maps",
  };
  const section = document.getElementById("slides");
  const maps = section.querySelector(".maps");
  const legend = section.querySelector(".legend");
  const note = section.querySelector(".note");
  const SVG = "http://www.w3.org/2000/svg";

  const slideSelect = select([]);
  const scaleSelect = select(Object.entries(SCALES));
  const slider = element("input", { type: "range", min: 0, step: 1, id: "epoch" });
  const epochShown = element("output", { for: "epoch" });
  const outlineBox = element("input", { type: "checkbox" });
  const outlineLabel = element("label", {}, outlineBox, " outlines of lesions");
  outlineBox.checked = true;

  const slideName = (slide) =>
    `${slide.data}, ${slide.model}, seed ${slide.seed}, fold ${slide.fold}: ${slide.bag}`;

  function outline(slide) {
    const drawn = document.createElementNS(SVG, "svg");
    drawn.setAttribute("viewBox", `0 0 ${slide.shape[1]} ${slide.shape[0]}`);
    drawn.setAttribute("aria-hidden", "true");
    // Twice, to stand out from dark and from light tiles.
    for (const kind of ["under", "over"]) {
      const path = document.createElementNS(SVG, "path");
      path.setAttribute("d", slide.outline);
      path.setAttribute("class", kind);
      drawn.append(path);
    }
    return drawn;
  }

  function showEpoch() {
    const slide = report.slides[Number(slideSelect.value)];
    const index = Number(slider.value);
    const epoch = slide.epochs[index];
    epochShown.value = `epoch ${epoch}`;
    slider.setAttribute("aria-valuetext", `epoch ${epoch}`);
    for (const figure of maps.querySelectorAll("figure")) {
      const panel = slide.panels[Number(figure.dataset.panel)];
      const image = figure.querySelector("img");
      image.src = `data:image/png;base64,${panel.images[scaleSelect.value][index]}`;
      const name = `${slide.model} + ${panel.plugin}`;
      image.alt = `Attention of ${name} on ${slide.bag} in epoch ${epoch}`;
      figure.querySelector(".largest").textContent =
        `largest weight ${panel.largest[index]} (uniform: ${(1 / slide.n_instances).toPrecision(3)})`;
    }
  }

  function showLegend(slide) {
    const { label, ticks } = slide.legends[scaleSelect.value];
    const bar = element("div", { class: "bar" });
    bar.style.background = `linear-gradient(to right, ${report.stops.join(", ")})`;
    const marks = ticks.map(([place, text]) => {
      const mark = element("span", {}, text);
      mark.style.left = `${100 * place}%`;
      return mark;
    });
    const scale = element("div", { class: "ticks" }, ...marks);
    legend.replaceChildren(element("p", {}, label), bar, scale);
  }

  function showSlide() {
    const slide = report.slides[Number(slideSelect.value)];
    slider.max = slide.epochs.length - 1;
    outlineLabel.hidden = !slide.outline;
    maps.replaceChildren();
    slide.panels.forEach((panel, index) => {
      if (!isChosen({ plugin: panel.plugin })) return;
      const picture = element("div", { class: "picture" }, element("img"), outline(slide));
      const caption = element(
        "figcaption",
        {},
        element("b", {}, panel.plugin),
        element("span", { class: "largest" }),
      );
      maps.append(element("figure", { "data-panel": index }, caption, picture));
    });
    maps.style.setProperty("--columns", slide.shape[1]);
    maps.style.setProperty("--rows", slide.shape[0]);
    showOutlines();
    showLegend(slide);
    showEpoch();
  }

  function showOutlines() {
    maps.classList.toggle("bare", !outlineBox.checked);
  }

  function offerSlides() {
    const before = slideSelect.value;
    const offered = report.slides
      .map((slide, index) => [index, slide])
      .filter(([, { data, model, panels }]) => panels.some(({ plugin }) => isChosen({ data, model, plugin })));
    slideSelect.replaceChildren(
      ...offered.map(([index, slide]) => new Option(slideName(slide), index)),
    );
    section.classList.toggle("empty", !offered.length);
    if (!offered.length) return;
    if (offered.some(([index]) => String(index) === before)) slideSelect.value = before;
    showSlide();
  }

  if (report.slides.length) {
    section
      .querySelector(".controls")
      .append(
        labelled("slide", slideSelect),
        labelled("colours", scaleSelect),
        element("div", { class: "slider" }, element("label", { for: "epoch" }, "epoch"), slider, epochShown),
        outlineLabel,
      );
    section.insertBefore(
      element("p", { class: "none" }, "No slide is left by the filters."),
      maps,
    );
    note.textContent =
      "Validation slides that the runs of all plug-ins have kept; a pixel is a tile." +
      (report.slidesLeftOut ? ` ${report.slidesLeftOut} more were left out to keep this file small.` : "");
    slider.value = 0;
    slideSelect.addEventListener("change", showSlide);
    slider.addEventListener("input", showEpoch);
    outlineBox.addEventListener("change", showOutlines);
    scaleSelect.addEventListener("change", () => {
      showLegend(report.slides[Number(slideSelect.value)]);
      showEpoch();
    });
    onChoice(offerSlides);
  } else {
    note.textContent =
      "No run has kept the attention on a slide with coordinates (maps=4 keeps that of four).";
  }
}
