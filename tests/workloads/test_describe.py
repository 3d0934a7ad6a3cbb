import io

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from mmrl.cli.workload import app
from mmrl.errors import InputError
from mmrl.workloads.describe import describe, print_description
from mmrl.workloads.readers import read_trace
from mmrl.workloads.trace import Trace


def regular(n=120, step_s=0.5, names=("a", "b")):
    """Requests every step_s, to the models in turn; prompts 1..n, outputs 7."""
    return Trace(
        (np.arange(n) * step_s * 1e9).astype(np.int64),
        (np.arange(n) % len(names)).astype(np.int32),
        np.arange(1, n + 1, dtype=np.int32),
        np.full(n, 7, np.int32),
        np.arange(n) % len(names) == 1,
        tuple(names),
        n * step_s,
        ("[made] by hand",),
    )


def test_figures_of_a_regular_trace():
    whole, a, b = describe(regular())
    assert (whole.name, whole.requests, whole.rate_per_s) == ("all", 120, 2.0)
    assert whole.cv == 0
    assert whole.dispersion[:1] == (0,)
    assert np.isnan(whole.dispersion[1:]).all()  # 6 and 1 windows say nothing
    assert whole.batch_share == 0.5
    assert (a.batch_share, b.batch_share) == (0, 1)
    assert whole.prompt.quantiles == pytest.approx((12.9, 60.5, 108.1, 118.81))
    assert whole.output.lognormal == pytest.approx((7, 0))


def test_dispersion_by_hand():
    # 30 windows of 1 s that hold 0 or 4 requests in turn: mean 2, variance 4.
    arrival_ns = np.repeat(np.arange(1, 30, 2) * 10**9, 4)
    ones = np.ones(60, np.int32)
    trace = Trace(arrival_ns, 0 * ones, ones, ones, ones == 0, ("a",), 30.0)
    assert describe(trace)[0].dispersion[0] == pytest.approx(2)


def test_the_description_names_every_figure_in_80_columns():
    out = io.StringIO()
    print_description(regular(), Console(file=out, width=80))
    text = out.getvalue()
    for expected in ("120 requests to 2 models in 60.0 s", "CV", "IDC 10 s", "p99", "50%"):
        assert expected in text
    assert "- [made] by hand" in text
    assert "…" not in text


def test_empty_and_tiny_traces_can_be_shown():
    for n in (0, 1, 2):
        trace = regular(120).slice(0.0, max(n, 0.2) / 2).select(np.arange(n))
        shown = io.StringIO()
        print_description(trace, Console(file=shown))
        assert str(n) in shown.getvalue()


run = CliRunner().invoke


def test_generate_describe_fit(tmp_path):
    made, fitted, page = tmp_path / "made.csv", tmp_path / "fitted.csv", tmp_path / "page.html"
    asked = ["--models", "a,b,c", "--rate", "5", "--duration", "60", "--arrivals", "gamma"]
    done = run(app, ["generate", "--out", str(made), *asked, "--lengths", "chat,batch"])
    assert done.exit_code == 0, done.output
    trace = read_trace([made])
    assert trace.model_names == ("a", "b", "c")
    assert trace.duration_s == 60
    done = run(app, ["describe", str(made), "--plot", str(page)])
    assert f"{len(trace):,} requests to 3 models" in done.output
    assert "generated: mean rate 5/s" in done.output
    html = page.read_text()
    assert "Requests per second" in html
    assert '<script src="http' not in html
    done = run(app, ["fit", str(made), "--models", "x,y", "--rate", "2", "--out", str(fitted)])
    assert done.exit_code == 0, done.output
    assert read_trace([fitted]).rate_per_s == pytest.approx(2)
    assert "time dilation" in done.output
    short = ["fit", str(made), "--models", "x,y", "--longest", "500", "--out", str(fitted)]
    done = run(app, short)
    assert done.exit_code == 0, done.output
    assert "over the limit of 500 tokens" in done.output
    assert read_trace([fitted]).tokens.max() <= 500 < trace.tokens.max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cv", "99"], "arrivals.cv: .* within 0.1 to 16"),
        (["--lengths", "poem"], "unknown length family 'poem'"),
        (["--lengths", "empirical"], "need each other"),
        (["--models", "a,a"], "not unique"),
        (["--models", "a,,b"], "'' is not a model name"),
        (["--rate", "0"], "rate_per_s is 0"),
    ],
)
def test_wrong_options_leave_no_file(tmp_path, options, message):
    path = tmp_path / "x.csv"
    asked = ["--out", str(path), "--models", "a,b", "--rate", "1", "--duration", "9", *options]
    with pytest.raises(InputError, match=message):
        run(app, ["generate", *asked], catch_exceptions=False)
    assert not path.exists()
