"""The kit as two Kaggle cells: lib.py written by a cell magic, solve.py pasted below it."""
import numpy as np
import pytest
from kit import ROOT, TINY, tiny_arrays

import lib

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytestmark = [pytest.mark.slow, pytest.mark.fault(51)]

FLAGS = ["--data", "tiles/mars.npz", *TINY, "--out"]
SOLVE = (ROOT / "solve.py").read_text()
CELLS = {
    "lib": "%%writefile lib.py\n" + (ROOT / "lib.py").read_text(),
    "paste": SOLVE,
    "main": f"torch.set_num_threads(2)\nassert main({[*FLAGS, 'one']}) == 0\n"
            "assert torch.get_num_threads() == 2\ntorch.set_num_threads(1)",
    "paste again": SOLVE,
    "save": "%%writefile solve.py\n" + SOLVE,
    "import": f"import solve\nassert solve.main({[*FLAGS, 'two']}) == 0"}


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Return the folder of a live kernel, and name → output of the cells, run there in order."""
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "tiles").mkdir()
    np.savez(folder / "tiles" / "mars.npz", **tiny_arrays())
    book = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, CELLS.values())))
    nbclient.NotebookClient(book, timeout=300, kernel_name="python3",
                            resources={"metadata": {"path": str(folder)}}).execute()
    outputs = {}
    for name, cell in zip(CELLS, book.cells, strict=True):
        outputs[name] = {"stdout": "", "stderr": "", "pages": []}
        for output in cell.outputs:
            if output.output_type == "stream":
                outputs[name][output.name] += output.text
            else:
                outputs[name]["pages"].append(output.data["text/html"])
    return folder, outputs


def test_a_pasted_cell_may_run_twice_and_knows_no_kernel_argument(executed):
    """The last line runs main([]): it looks for the default data, not for the kernel's -f file.
    Here there is none: one sentence, no SystemExit or traceback, the second time as the first."""
    first, again = executed[1]["paste"], executed[1]["paste again"]
    assert first["stderr"].startswith("solve.py: data: no such file, or no .npz")
    assert first["stderr"].count("\n") == 1 and again["stderr"].count("\n") == 1
    assert first["stderr"].split(";")[0] == again["stderr"].split(";")[0]


def test_pasted_or_imported_it_does_a_whole_run(executed):
    """A network on each of two cores, and on one, scores and pictures below the cell, and the same
    bytes of a checked submission; import solve does nothing by itself."""
    folder, outputs = executed
    for name, workers in (("main", "2 workers"), ("import", "1 workers")):
        out, pages = outputs[name]["stdout"], outputs[name]["pages"]
        assert workers in out and out.count("data: ") == 1 and "stage1_miou: " in out
        assert len(pages) == 1 and "Mean IoU" in pages[0] and "<td" in pages[0]
    lib.check_submission(folder / "one" / "submission.csv", 6, 32 * 64)
    one, two = ((folder / name / "submission.csv").read_bytes() for name in ("one", "two"))
    assert one == two
