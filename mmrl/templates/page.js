// Draw each figure from the JSON beside it; the legend shows and hides a series in all of them.
// A button's data attribute (data-policy="slack") names the traces by their meta ({policy: "slack"}).
const plots = [...document.querySelectorAll(".plot")];
for (const plot of plots) {
  const { data, layout } = JSON.parse(plot.nextElementSibling.textContent);
  Plotly.newPlot(plot, data, layout, { displayModeBar: false, responsive: true });
}
for (const button of document.querySelectorAll(".legend button")) {
  const [[key, name]] = Object.entries(button.dataset);
  button.onclick = () => {
    const shown = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", shown);
    for (const plot of plots) {
      const traces = plot.data.flatMap((trace, k) =>
        trace.meta?.[key] === name ? [k] : []);
      if (traces.length) Plotly.restyle(plot, { visible: shown }, traces);
    }
  };
}
