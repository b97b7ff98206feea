"""A report keeps its values through a file, and shows them as text, HTML and figures without leaving anything out."""

from __future__ import annotations

import base64
import copy
import dataclasses
import json
import math
import pickle
import re
import typing
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot as plt

import stabkit
from stabkit._table import Table, number
from stabkit.checks import MARGIN
from stabkit.frontier import Outcome
from stabkit.render import MECHANISMS, headline, sections
from stabkit.report import Check, LayerGate, Report, Run, Share

QUICK = {"rank": 20, "retain_samples": 96, "forget_samples": 48, "spectrum_samples": 96, "seeds": 2, "steps": 30}


@pytest.fixture(scope="module")
def report(request):
    model, sets = request.getfixturevalue("digits_mlp"), request.getfixturevalue("class_deletion")
    return stabkit.predict(model, *sets, algorithm="agu", lr=0.5, mix=0.5, **QUICK)


@pytest.fixture(scope="module")
def loaded(report):
    return Report.from_json(report.to_json())


# ------------------------------------------------------------------ through a file and back

finite = st.floats(allow_nan=False)
plain = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
)


def values_of(kind):
    """A strategy for an annotated type; so a new field of a report is tested without being named here."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return st.builds(kind, **{f.name: values_of(hints[f.name]) for f in dataclasses.fields(kind) if f.compare})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and arguments[-1] is Ellipsis:
        return st.lists(values_of(arguments[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values_of, arguments))
    if origin is dict:
        return st.dictionaries(
            st.text(max_size=5), plain if arguments[1] is typing.Any else values_of(arguments[1]), max_size=3
        )
    if origin is not None:  # X | None
        return st.none() | values_of(next(a for a in arguments if a is not type(None)))
    return {float: finite, int: st.integers(), str: st.text(max_size=8), bool: st.booleans()}[kind]


@given(original=values_of(Report))
def test_what_comes_back_from_json_is_what_went_in(original):
    text = original.to_json()
    again = Report.from_json(text)
    assert again == original
    assert again.to_json() == text
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not strict JSON"))


@pytest.mark.parametrize("kind", [str, Path])
def test_a_real_report_survives_a_file(report, tmp_path, kind):
    path = kind(tmp_path / "new folder" / "report.json")
    text = report.to_json(path)
    assert Path(path).read_text(encoding="utf-8") == text
    again = Report.from_json(path)
    assert again == report
    assert again.summary() == report.summary()
    assert again._repr_html_().count("<tr>") == report._repr_html_().count("<tr>")


def test_files_that_are_not_reports_are_refused(report):
    with pytest.raises(ValueError, match=r"must have schema 8; got None"):
        Report.from_dict({"verdict": "stable"})
    with pytest.raises(ValueError, match=r"must have schema 8; got 99"):
        Report.from_dict({**report.to_dict(), "schema": 99})
    missing = report.to_dict()
    del missing["cause"]
    with pytest.raises(ValueError, match=r"`Report` needs the fields .*'cause'.* not a stabkit report"):
        Report.from_dict(missing)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (
            b"hello",
            ValueError,
            r"must hold JSON, as `to_json` writes it; got '.*report.json' \(Expecting value: line 1",
        ),
        (b"\xff\xfe", ValueError, r"must hold JSON.*; got '.*report.json' \('utf-8' codec can't decode byte 0xff"),
        (b"[1, 2]", TypeError, r"`plain` of `Report.from_dict` must be a dictionary, .*; got \[1, 2\]"),
        (b"{}", ValueError, r"must have schema 8; got None\. Make it anew"),
    ],
)
def test_files_without_a_report_are_named(tmp_path, content, error, message):
    path = tmp_path / "report.json"
    path.write_bytes(content)
    for source in (path, str(path)):
        with pytest.raises(error, match=message):
            Report.from_json(source)


def test_what_is_no_file_and_no_text_is_named(report, tmp_path):
    for source in (tmp_path / "none.json", tmp_path, "[1, 2]", ""):
        message = (
            rf"`source` of `Report.from_json` must name a file or be JSON text.*; got {re.escape(repr(str(source)))}\."
        )
        with pytest.raises(FileNotFoundError, match=message):
            Report.from_json(source)
    with pytest.raises(FileNotFoundError, match=rf"got '{'x' * 200}…'"):
        Report.from_json("x" * 100_000)
    with pytest.raises(ValueError, match=r"must hold JSON.*; got \"\{'a': 1\}\" \(Expecting property name"):
        Report.from_json("{'a': 1}")
    with pytest.raises(TypeError, match=r"`source` of `Report.from_json` must be a path or JSON text; got None"):
        Report.from_json(None)
    with pytest.raises(TypeError, match=r"got \{'schema': 2\}\. `from_dict` reads dictionaries"):
        Report.from_json({"schema": 2})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("layers", 3, r"TypeError: object of type 'int' has no len"),
        ("probability", "high", r"KeyError: 'high'"),
        ("run", 3, r"ValueError: `Run` needs the fields .*; got int"),
    ],
)
def test_values_of_the_wrong_kind_are_refused(report, key, value, message):
    with pytest.raises(
        ValueError, match=rf"`plain` of `Report.from_dict` must hold .*; got something else \({message}"
    ):
        Report.from_dict({**report.to_dict(), key: value})


def test_equal_reports_have_equal_hashes(report, loaded):
    assert loaded == report
    assert hash(loaded) == hash(report)
    doubled = dataclasses.replace(report, critical_lr=2 * report.critical_lr)
    assert {report, loaded, doubled} == {report, doubled}
    assert hash(doubled) != hash(report)


def test_a_report_can_be_pickled_and_copied(report):
    pickled = pickle.loads(pickle.dumps(report))
    assert pickled == report
    with pytest.raises(RuntimeError, match=r"`at` of `Report` needs .* a report from a file or a pickle does not hold"):
        pickled.at(lr=0.1)
    for again in (copy.copy(report), copy.deepcopy(report)):
        assert again == report
        assert again is not report
        assert again.at(lr=0.1).probability == report.at(lr=0.1).probability
        assert again.preconditioner is report.preconditioner
    assert copy.deepcopy(report).run.settings is not report.run.settings
    with pytest.raises(RuntimeError, match="a report from a file or a pickle"):
        copy.deepcopy(pickled).at(lr=0.1)


def test_the_layers_show_the_gates_that_are_applied(report):
    """An exponent that is not trusted is gated all the same by SRAGU's untrusted="gate"."""
    known = {"exponent": 3.0, "standard_error": 0.1, "note": "4 eigenvalues"}
    layers = tuple(
        LayerGate(layer=name, trusted=trusted, gate=gate, **{**known, "note": "" if trusted else known["note"]})
        for name, trusted, gate in (("a", True, 1.0), ("b", True, 0.5), ("c", False, 1.0), ("d", False, 0.25))
    )
    section = next(s for s in sections(dataclasses.replace(report, layers=layers)) if s.title == "Layer exponents")
    assert [row.note for row in section.rows] == [
        "gate 1.00",
        "gate 0.50",
        "not trusted: 4 eigenvalues",
        "gate 0.25, not trusted: 4 eigenvalues",
    ]


def test_a_loaded_report_says_what_it_cannot_do(loaded):
    with pytest.raises(RuntimeError, match=r"`frontier` of `Report` needs what was measured.*predict"):
        loaded.frontier()
    with pytest.raises(RuntimeError, match=r"`at` of `Report` needs what was measured.*predict"):
        loaded.at(lr=0.1)


# ------------------------------------------------------------------ text


def test_the_summary_holds_every_number_a_decision_needs(report):
    text = report.summary()
    assert text.splitlines()[0] == f"{report.verdict.upper()}  {headline(report)}"
    for value in (
        report.critical_lr,
        report.critical_mix,
        report.thresholds.step_limit,
        report.thresholds.largest,
        report.coherence.retain,
    ):
        assert number(value) in text
    for layer in report.layers:
        assert layer.layer in text
    for line in report.advice:
        assert line in text
    assert MECHANISMS[report.cause.mechanism] in text
    assert str(report) == text


def test_the_summary_of_one_linearisation_holds_its_error(digits_mlp, class_deletion):
    """A staged one goes on with real steps where the error is large, and does not rest on it."""
    report = stabkit.predict(digits_mlp, *class_deletion, algorithm="agu", lr=0.5, mix=0.5, mode="standard", **QUICK)
    assert re.search(rf"linearisation error.*{re.escape(number(report.linearisation_error))}", report.summary())


@pytest.mark.parametrize(("value", "text"), [(None, "–"), (math.inf, "∞"), (-math.inf, "-∞"), (0.12345, "0.123")])
def test_numbers_are_rounded_for_reading_alone(value, text):
    assert number(value) == text


def test_a_failed_check_shows_its_remedy(report):
    check = Check(name="rank", value=None, threshold=1.0, passed=False, meaning="It is low.", remedy="Do more of it.")
    doubtful = dataclasses.replace(report, checks=(check,))
    assert doubtful.confidence == "low"
    assert "It is low. Do more of it." in doubtful.summary()
    assert "Confidence: low" in doubtful.summary()
    assert dataclasses.replace(report, checks=()).confidence == "high"


# ------------------------------------------------------------------ HTML


class Page(HTMLParser):
    """Tags, what they point to, and whether they are closed in order."""

    VOID = frozenset({"meta", "img", "br", "hr", "link"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.targets, self.open, self.text = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.targets += [value for name, value in attrs if name in {"src", "href"}]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("kind", [str, Path])
def test_the_page_is_one_file_with_everything_in_it(report, tmp_path, kind):
    target = kind(tmp_path / "deep" / "report.html")
    table = Table(title="Extra & more", columns=("a",), rows=(("<b>",),), footer="below")
    marks = [Outcome(lr=0.1, mix=0.3, diverged=False), Outcome(lr=1.0, mix=0.3, diverged=True)]
    written = report.save_html(
        target, frontier=report.frontier(lr=[0.1, 1], mix=[0.2, 0.8]), outcomes=marks, tables=[table]
    )
    assert written == Path(target)
    page = Page(written.read_text(encoding="utf-8"))
    assert page.targets
    assert all(target.startswith("data:image/png;base64,") for target in page.targets)
    assert len(page.targets) == 2  # the run and the frontier
    assert all(base64.b64decode(t.split(",")[1]).startswith(b"\x89PNG") for t in page.targets)
    assert "script" not in page.tags
    words = " ".join(page.text)
    assert {"Extra & more", "<b>", "below"} <= {t.strip() for t in page.text}
    assert headline(report) in words
    assert all(part in words for advice in report.advice for part in advice.split("`"))
    assert [p.name for p in Path(target).parent.iterdir()] == ["report.html"]


def test_what_is_no_table_is_refused(report, tmp_path):
    table = Table(title="Extra", columns=("a",), rows=(("b",),))
    for tables, got in (([table, report], "Report"), (table, "Table"), (["text"], "str")):
        with pytest.raises(TypeError, match=rf"`tables` of `Report.save_html` must be a list of tables; got {got}\."):
            report.save_html(tmp_path / "page.html", tables=tables)
    assert not (tmp_path / "page.html").exists()


def test_the_default_page_has_a_frontier_and_a_loaded_ones_has_none(report, loaded, tmp_path):
    assert len(Page(report.save_html(tmp_path / "a.html").read_text(encoding="utf-8")).targets) == 2
    page = loaded.save_html(tmp_path / "b.html").read_text(encoding="utf-8")
    assert len(Page(page).targets) == 1
    assert "<h3>Stability frontier</h3>\n<p>Not drawn: a report that was loaded from a file" in page


def test_a_notebook_shows_the_verdict_without_script(report):
    html = report._repr_html_()
    page = Page(html)
    assert "script" not in page.tags
    assert re.search(rf'class="verdict {report.verdict}"', html)


def test_calls_in_the_advice_are_code(report):
    html = dataclasses.replace(report, advice=("Ask `report.recommend()` or <b>.", "Plain."))._repr_html_()
    assert "<li>Ask <code>report.recommend()</code> or &lt;b&gt;.</li>" in html
    assert "<li>Plain.</li>" in html


def test_names_are_escaped(report):
    run = dataclasses.replace(report.run, model="<script>alert(1)</script>")
    page = Page(dataclasses.replace(report, run=run)._repr_html_())
    assert "script" not in page.tags
    assert "alert(1)" in "".join(page.text)


def test_a_scan_that_nothing_holds_in_has_no_critical_step_size_to_show(report):
    detail = dataclasses.replace(report.critical_lr_detail, value=1e-9, low=1e-9, high=1e-9, scanned=(1e-9, 1.0))
    shown = str(dataclasses.replace(report, critical_lr=1e-9, critical_lr_detail=detail))
    assert re.search(r"critical step size +–  \(at this mix; no step size down to 1e-09 holds\)", shown)


# ------------------------------------------------------------------ figures


@pytest.mark.parametrize("level", [-2.0, 0.0, 1e-3])
def test_losses_of_any_sign_are_drawn(report, level):
    run = dataclasses.replace(report.run, divergence_level=level)
    nothing = (math.nan,) * len(report.rollout.steps)
    for curve in (report.rollout.retain_loss, nothing):
        names = ("retain_loss", "retain_low", "retain_high", "forget_loss")
        rollout = dataclasses.replace(report.rollout, **dict.fromkeys(names, curve))
        figure, axes = dataclasses.replace(report, run=run, rollout=rollout).plot()
        figure.canvas.draw()
        (line,) = (line for line in axes[0].get_lines() if line.get_label() == "retain, predicted")
        assert line.get_ydata()[0] > 0
        plt.close(figure)


def test_the_report_draws_into_given_axes(report):
    figure, axes = plt.subplots(1, 2)
    drawn, used = report.plot(axes=axes)
    assert drawn is figure
    assert list(used) == list(axes)
    losses = next(line for line in axes[0].get_lines() if line.get_label() == "retain, predicted")
    np.testing.assert_array_equal(losses.get_xdata(), report.rollout.steps)
    layers = {s.name for s in report.cause.eigenvector_layers}
    assert {t.get_text() for t in axes[1].get_yticklabels()} == layers == {"1", "3"}
    with pytest.raises(TypeError, match=r"`axes` of `Report.plot` must be two axes; got one Axes\. .*subplots\(1, 2\)"):
        report.plot(axes=axes[0])
    with pytest.raises(TypeError, match=r"`axes` of `Report.plot` must be two axes; got 1 of them\."):
        report.plot(axes=axes[:1])
    plt.close(figure)


def test_values_that_are_not_finite_leave_the_drawing_at_its_top(report):
    count = len(report.rollout.steps)
    losses = (0.1, 0.2, math.inf, math.nan, *[math.inf] * (count - 4))
    rollout = dataclasses.replace(report.rollout, retain_loss=losses, retain_high=(math.inf,) * count)
    cause = dataclasses.replace(report.cause, eigenvector_layers=(), displacement_layers=())
    figure, axes = dataclasses.replace(report, rollout=rollout, cause=cause).plot()
    figure.canvas.draw()
    (curve,) = (line for line in axes[0].get_lines() if line.get_label() == "retain, predicted")
    drawn = curve.get_ydata()
    assert drawn[:2].tolist() == [0.1, 0.2]
    assert drawn[2] > report.run.divergence_level
    assert np.isnan(drawn[3:]).all()
    (arrow,) = (line for line in axes[0].get_lines() if line.get_marker() == "^")
    assert (arrow.get_xdata()[0], arrow.get_ydata()[0]) == (report.rollout.steps[2], drawn[2])
    assert axes[0].get_xlim() == (0, report.rollout.steps[-1])
    plt.close(figure)


def test_a_run_that_its_stop_rule_ends_is_said_to_end(report):
    settings = {**report.run.settings, "drift_tolerance": None, "leakage_bound": 0.05}
    ends = dataclasses.replace(
        report,
        run=dataclasses.replace(report.run, settings=settings),
        rollout=dataclasses.replace(report.rollout, stopped_step=7.0),
    )
    assert headline(ends).endswith(" Its stop rule (leakage above 0.05) is predicted to end it after step 7 of 30.")
    assert re.search(r"last step +7  \(of 30, by its stop rule \(leakage above 0\.05\): median of ", str(ends))
    figure, axes = ends.plot()
    (line,) = (line for line in axes[0].get_lines() if line.get_label() == "predicted early stop")
    assert list(line.get_xdata()) == [7, 7]
    plt.close(figure)
    whole = dataclasses.replace(report, rollout=dataclasses.replace(report.rollout, stopped_step=30.0))
    assert "stop rule" not in str(whole)
    assert "last step" not in str(whole)


def test_losses_begin_as_the_curve_does_and_say_where_they_cross(report):
    rollout = dataclasses.replace(
        report.rollout, retain_loss=(0.25, 9.0, 3.0), forget_loss=(0.5, 8.0, 4.0), steps=(0, 1, 30), samples=(96, 48)
    )
    broken = dataclasses.replace(report, rollout=rollout, divergence_step=1.0)
    level = number(report.run.divergence_level)
    assert re.search(r"retain loss +0\.25 → 9 at most  \(crosses", str(broken))
    assert f"crosses {level}, from where on it counts as diverged, near step 1; 3 where it ends or is given up" in str(
        broken
    )
    held = str(dataclasses.replace(broken, divergence_step=None))
    assert re.search(
        r"retain loss +0\.25 → 3  \(predicted end, mean of the 96 samples linearised; diverged from ", held
    )


def test_words_fit_the_verdict(report):
    """What grows need not break a run, and a run may be near the edge where nothing grows."""
    slides = dataclasses.replace(report.cause, mechanism="saddle")
    still = dataclasses.replace(report.cause, mechanism="none")
    words = "what grows, but is not predicted to break the run: the retain loss itself"
    assert words in str(dataclasses.replace(report, verdict="stable", cause=slides))
    assert words not in str(dataclasses.replace(report, verdict="diverges", cause=slides))
    for probability, words in ((0.2, "but the critical step size may lie below"), (0.8, "the run breaks on its way")):
        rollout = dataclasses.replace(report.rollout, probability=probability)
        edge = dataclasses.replace(report, verdict="marginal", cause=still, rollout=rollout)
        assert f"a factor e within the run; {words}" in str(edge)
        assert "–  (A marginal verdict claims neither side.)" in str(edge)
    assert MARGIN in str(report)
    assert "claims neither side" not in str(dataclasses.replace(report, verdict="stable"))
    figure, axes = edge.plot()
    assert axes[1].get_title() == "which layers"
    plt.close(figure)


def test_the_frontier_draws_probability_boundary_and_runs(report):
    front = report.frontier(
        lr=np.geomspace(report.critical_lr / 30, report.critical_lr * 30, 9).tolist(), mix=[0.1, 0.5, 0.9]
    )
    marks = [Outcome(lr=0.1, mix=0.3, diverged=False), Outcome(lr=1.0, mix=0.3, diverged=True)]
    figure, ax = front.plot(outcomes=marks)
    (mesh,) = ax.collections
    np.testing.assert_array_equal(np.asarray(mesh.get_array()).reshape(front.probability.shape), front.probability)
    line = ax.get_lines()[0]
    np.testing.assert_array_equal(line.get_ydata(), front.critical_lr[np.isfinite(front.critical_lr)])
    points = {(x, y) for drawn in ax.get_lines()[1:] for x, y in zip(drawn.get_xdata(), drawn.get_ydata(), strict=True)}
    assert points == {(0.3, 0.1), (0.3, 1.0)}
    plt.close(figure)


def test_a_frontier_of_one_cell_draws(report):
    figure, ax = report.frontier(lr=[0.1], mix=[0.5]).plot()
    figure.canvas.draw()
    ((x, y),) = ax.get_lines()[0].get_xydata()  # one mix is a curve over step sizes, here of one
    assert (x, y) == (0.1, pytest.approx(report.frontier(lr=[0.1], mix=[0.5]).probability[0, 0]))
    plt.close(figure)


def test_the_default_frontier_brackets_the_boundary_of_every_mix_it_can(report):
    front = report.frontier()
    assert front.probability.shape == (20, 20)
    assert np.isfinite(front.critical_lr).mean() > 0.9
    here = int(np.abs(front.mix - 0.5).argmin())
    assert front.critical_lr[here] == pytest.approx(report.critical_lr, rel=1.0)


def test_a_frontier_without_mixes_is_refused(report):
    with pytest.raises(ValueError, match=r"`mix` of `Report.frontier` must hold at least one value; got none"):
        report.frontier(mix=[])
    with pytest.raises(ValueError, match=r"`lr` .*got"):
        report.frontier(lr=[])
    assert report.frontier(lr=0.1, mix=0.5).probability.shape == (1, 1)


def test_run_reads_its_settings(report):
    assert isinstance(report.run, Run)
    assert (report.run.lr, report.run.mix, report.run.steps) == (0.5, 0.5, 30)
    assert isinstance(report.cause.forget_samples[0], Share)
