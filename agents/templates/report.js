// Draw each figure from the JSON beside it; the legend shows and hides a policy in all of them.
const plots = [...document.querySelectorAll(".plot")];
for (const plot of plots) {
  const { data, layout } = JSON.parse(plot.nextElementSibling.textContent);
  Plotly.newPlot(plot, data, layout, { displayModeBar: false, responsive: true });
}
for (const button of document.querySelectorAll(".legend button")) {
  button.onclick = () => {
    const shown = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", shown);
    for (const plot of plots) {
      const traces = plot.data.flatMap((trace, k) =>
        trace.meta?.policy === button.dataset.policy ? [k] : []);
      if (traces.length) Plotly.restyle(plot, { visible: shown }, traces);
    }
  };
}
