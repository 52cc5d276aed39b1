"""The kit as two Kaggle cells: lib.py written by a cell magic, solve.py pasted below it."""

import numpy as np
import pytest
from conftest import ROOT, tiny_arrays

import lib

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

FLAGS = (
    "'--data', 'tiles/mars.npz', '--folds', '2', '--width', '4', '--epochs', '1', '--no-clean', "
    "'--device', 'cpu', '--precision', 'float32'"
)
CELLS = {
    "lib": "%%writefile lib.py\n" + (ROOT / "lib.py").read_text(),
    "paste": (ROOT / "solve.py").read_text(),
    "main": "import torch\ntorch.set_num_threads(2)\n"
    f"assert main(['--out', 'one', {FLAGS}]) == 0\n"
    "assert torch.get_num_threads() == 2\ntorch.set_num_threads(1)",
    "save": "%%writefile solve.py\n" + (ROOT / "solve.py").read_text(),
    "import": f"import solve\nassert solve.main(['--out', 'two', {FLAGS}]) == 0",
    "globals": "assert __name__ == '__main__' and '__file__' not in globals()",
}


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """All cells in a live kernel whose folder holds no data/: (folder, name → what the cell printed on each
    stream)."""
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "tiles").mkdir()
    np.savez(folder / "tiles" / "mars.npz", **tiny_arrays())
    order = ["globals", "lib", "paste", "main", "paste", "save", "import"]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELLS[name]) for name in order])
    nbclient.NotebookClient(
        book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    printed = []
    for name, cell in zip(order, book.cells, strict=True):
        shown = [output for output in cell.outputs if output.output_type != "stream"]
        assert all(output.output_type == "display_data" for output in shown), (name, shown)
        assert len(shown) == (name in ("main", "import"))
        for page in (output.data["text/html"] for output in shown):  # the scores and key pictures
            assert "mean IoU (competition)" in page and 4 <= page.count("<figure") <= 8
        printed.append(
            (
                name,
                *(
                    "".join(output.text for output in cell.outputs if output.get("name") == stream)
                    for stream in ("stdout", "stderr")
                ),
            )
        )
    return folder, printed


def test_the_paste_reaches_main_without_the_kernels_arguments(executed):
    """Fault 51: the pasted cell's last line runs main([]): it looks for the default data, not for the
    kernel's -f file.

    Here there is no data folder, so that is one sentence, and no SystemExit or traceback ends the cell.
    """
    for name, _, err in executed[1]:
        if name == "paste":
            assert err.startswith("solve.py: --data data: no such file, or no .npz") and err.count("\n") == 1


def test_the_pasted_functions_do_a_whole_run(executed):
    """After the two cells main([...]) trains, a network on each of two cores, predicts and writes a checked
    submission."""
    folder, printed = executed
    out = next(out for name, out, _ in printed if name == "main")
    assert "2 workers" in out and "stage1_miou: " in out and "submission.csv" in out
    lib.check_submission(folder / "one" / "submission.csv", 6, 32 * 64)


def test_the_cell_may_run_twice(executed):
    """Fault 51: pasting again, after a run, behaves as the first time."""
    pasted = [(out, err.split(";")[0]) for name, out, err in executed[1] if name == "paste"]
    assert len(pasted) == 2 and pasted[0] == pasted[1]


def test_import_solve_runs_too(executed):
    """import solve does nothing by itself; solve.main([...]) gives the same submission as the pasted cell,
    here with one worker in place of two."""
    folder, printed = executed
    out = next(out for name, out, _ in printed if name == "import")
    assert out.count("data: ") == 1  # one run, started by the call
    assert "1 workers" in out
    assert (folder / "two" / "submission.csv").read_bytes() == (
        folder / "one" / "submission.csv"
    ).read_bytes()
