"""The notebooks run from a clean kernel, and hold what that gives. `python tests/test_notebooks.py` runs them in place."""

import copy
import difflib
import os
import re
import sys
import tempfile
from html import unescape
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
METADATA = {
    "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
    "language_info": {"name": "python"},
}
SECONDS = 300  # for one cell; only what hangs takes so long
LARGEST = 800_000  # bytes
ALIKE = 0.95  # a run at the edge of stability may end otherwise on another machine, and some words change with it
NO_BARS = "ignore:IProgress not found"  # tqdm asks for ipywidgets, which no notebook needs, as none shows a bar
IMAGE = re.compile(r"[A-Za-z0-9+/=]{100,}")  # base64, in which anything may stand
NUMBER = re.compile(r"[-+±]?\b\d[\d,.]*(e[-+]?\d+)?\b")
LOCAL_PATH = re.compile(
    r"(?<![\w:/.])/(home|Users|tmp|root|var|opt|usr|mnt|private)/|[A-Z]:\\\\|ipykernel_\d|site-packages"
)


def executed(notebook, folder):
    """A copy of a notebook, run from top to bottom by a new kernel."""
    fresh = copy.deepcopy(notebook)
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    # The figures are the notebook's own backend's, whatever the caller's is.
    kept = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    env = {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": NO_BARS}
    client = NotebookClient(
        fresh,
        timeout=SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": folder}},
        record_timing=False,
        coalesce_streams=True,
    )
    client.execute(env=env)
    return fresh


def refresh(path):
    """Run a notebook and store it with its outputs and nothing of the machine."""
    with tempfile.TemporaryDirectory() as folder:
        fresh = executed(nbformat.read(path, as_version=4), folder)
    fresh.metadata = nbformat.from_dict(METADATA)
    for cell in fresh.cells:
        cell.metadata = {}
    nbformat.write(fresh, path)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code(notebook) for output in cell.outputs]


def kinds(notebook):
    """What each code cell gives: streams by name, results by their formats."""
    return [
        [(o.output_type, o.get("name"), sorted(o.get("data", ()))) for o in cell.outputs] for cell in code(notebook)
    ]


def words(notebook):
    """All that the outputs say, without markup, and every number as one sign."""
    said = []
    for output in outputs(notebook):
        data = output.get("data", {})
        html = re.sub(r"<style.*?</style>|<svg.*?</svg>|<[^>]*>", " ", data.get("text/html", ""), flags=re.DOTALL)
        plain = "" if html else data.get("text/plain", "")
        said += NUMBER.sub("#", f"{output.get('text', '')} {unescape(html)} {plain}").split()
    return said


def likeness(stored, fresh):
    return difflib.SequenceMatcher(None, words(stored), words(fresh), autojunk=False).ratio()


def faults(text):
    """What must not be in a stored notebook."""
    notebook = nbformat.reads(text, as_version=4)
    written = IMAGE.sub("", text)
    found = [match.group() for match in LOCAL_PATH.finditer(written)]
    found += [place for place in (str(ROOT), sys.prefix) if place in written]
    found += [output.output_type for output in outputs(notebook) if output.output_type == "error"]
    found += [output.name for output in outputs(notebook) if output.get("name") == "stderr"]
    found += [f"metadata of cell {i}" for i, cell in enumerate(notebook.cells) if cell.metadata]
    return found + ([] if notebook.metadata == METADATA else ["metadata"])


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


def test_there_are_notebooks():
    assert [path.name for path in NOTEBOOKS] == ["01_predict.ipynb", "02_remedy.ipynb", "03_theory.ipynb"]


def test_a_notebook_runs_and_holds_what_it_gives(notebook, tmp_path):
    fresh = executed(notebook, tmp_path)
    assert kinds(notebook) == kinds(fresh)
    assert likeness(notebook, fresh) >= ALIKE
    assert not list(tmp_path.iterdir())


def test_a_notebook_was_stored_after_one_run_from_top_to_bottom(notebook):
    cells = code(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any("image/png" in output.get("data", {}) for output in outputs(notebook))
    assert cells[-1].outputs


def test_a_notebook_holds_no_error_and_nothing_of_the_machine(path):
    assert faults(path.read_text(encoding="utf-8")) == []
    assert path.stat().st_size < LARGEST
    assert nbformat.validate(nbformat.read(path, as_version=4)) is None


def test_a_notebook_says_no_number_that_no_cell_has_computed(notebook):
    prose = [re.sub(r"`[^`]*`", "", cell.source) for cell in notebook.cells if cell.cell_type == "markdown"]
    assert [line for text in prose for line in text.splitlines() if re.search(r"\d", line)] == []


def small(*sources):
    cells = [nbformat.v4.new_code_cell(source, id=f"cell-{i}") for i, source in enumerate(sources)]
    return nbformat.v4.new_notebook(cells=cells, metadata=METADATA)


def test_what_is_stale_or_broken_is_told(tmp_path):
    fresh = executed(small("print('the run holds for', 0.5)", "None", "{}"), tmp_path)
    assert kinds(fresh) == [[("stream", "stdout", [])], [], [("execute_result", None, ["text/plain"])]]
    other = copy.deepcopy(fresh)
    other.cells[0].outputs[0].text = "the run holds for 0.25\n"
    assert likeness(other, fresh) == 1
    other.cells[0].outputs[0].text = "the run diverges at 7\n"
    assert likeness(other, fresh) < ALIKE
    with pytest.raises(CellExecutionError, match="no such thing"):
        executed(small("raise KeyError('no such thing')"), tmp_path)


def test_what_must_not_be_stored_is_found(tmp_path):
    assert faults(nbformat.writes(executed(small("print('n/a: 2/λ')"), tmp_path))) != []  # language_info has versions
    notebook = small("1")
    assert faults(nbformat.writes(notebook)) == []
    for kind, values, found in (
        ("stream", {"name": "stdout", "text": "read /home/me/data"}, ["/home/"]),
        ("stream", {"name": "stdout", "text": f"found in {ROOT}"}, [str(ROOT)]),
        ("stream", {"name": "stderr", "text": "careful"}, ["stderr"]),
        ("error", {"ename": "KeyError", "evalue": "x", "traceback": []}, ["error"]),
    ):
        notebook.cells[0].outputs = [nbformat.v4.new_output(kind, **values)]
        assert set(found) <= set(faults(nbformat.writes(notebook)))
    notebook.cells[0].outputs, notebook.cells[0].metadata = [], {"execution": {"iopub.status.busy": "now"}}
    assert faults(nbformat.writes(notebook)) == ["metadata of cell 0"]


if __name__ == "__main__":
    for each in NOTEBOOKS:
        refresh(each)
