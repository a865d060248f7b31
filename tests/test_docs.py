"""The public surface is what the documents promise: names, signatures, complete docstrings, examples that run."""

import doctest
import inspect
import re
from pathlib import Path

import pytest

import gpu
import normkit as nk
from normkit import functional

# Without annotations. People know these from torch.nn.functional: a change breaks their code.
SIGNATURES = """
batch_norm(x, running_mean=None, running_var=None, weight=None, bias=None, training=False, momentum=0.1, eps=1e-05, *, channel_axis=1, ddof=1, out=None, stream=None)
batch_norm_forward(x, running_mean=None, running_var=None, weight=None, bias=None, training=False, momentum=0.1, eps=1e-05, *, channel_axis=1, ddof=1, out=None, stream=None)
batch_norm_backward(dy, x, mean, rstd, weight=None, training=True, *, channel_axis=1, out=None, needs=('x', 'weight', 'bias'), grad_dtype=None, stream=None)
layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-05, *, out=None, stream=None)
layer_norm_forward(x, normalized_shape, weight=None, bias=None, eps=1e-05, *, out=None, stream=None)
layer_norm_backward(dy, x, mean, rstd, normalized_shape, weight=None, *, out=None, needs=('x', 'weight', 'bias'), grad_dtype=None, stream=None)
instance_norm(x, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-05, *, channel_axis=1, ddof=1, out=None, stream=None)
instance_norm_forward(x, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-05, *, channel_axis=1, ddof=1, out=None, stream=None)
instance_norm_backward(dy, x, mean, rstd, weight=None, use_input_stats=True, *, channel_axis=1, out=None, needs=('x', 'weight', 'bias'), grad_dtype=None, stream=None)
group_norm(x, num_groups, weight=None, bias=None, eps=1e-05, *, channel_axis=1, out=None, stream=None)
group_norm_forward(x, num_groups, weight=None, bias=None, eps=1e-05, *, channel_axis=1, out=None, stream=None)
group_norm_backward(dy, x, mean, rstd, num_groups, weight=None, *, channel_axis=1, out=None, needs=('x', 'weight', 'bias'), grad_dtype=None, stream=None)
rms_norm(x, normalized_shape, weight=None, eps=None, *, out=None, stream=None)
rms_norm_forward(x, normalized_shape, weight=None, eps=None, *, out=None, stream=None)
rms_norm_backward(dy, x, rstd, normalized_shape, weight=None, *, out=None, needs=('x', 'weight'), grad_dtype=None, stream=None)
normalize(x, axes, weight=None, bias=None, eps=1e-05, *, center=True, out=None, stream=None)
normalize_forward(x, axes, weight=None, bias=None, eps=1e-05, *, center=True, out=None, stream=None)
normalize_backward(dy, x, mean, rstd, axes, weight=None, *, center=True, out=None, needs=('x', 'weight', 'bias'), grad_dtype=None, stream=None)
set_num_threads(n)
set_output_cache(limit_bytes)
get_num_threads()
"""  # noqa: E501
FUNCTIONS = [line.partition("(")[0] for line in SIGNATURES.split("\n") if line]

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^(?:<!-- needs: (?P<needs>[\w, ]+) -->\n)?```python\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)


def section(function, title):
    """The text under a heading of a NumPy-style docstring."""
    doc = inspect.getdoc(function)
    found = re.search(rf"^{title}\n-+\n(.*?)(?=\n\n[A-Z]\w+\n---|\Z)", doc, re.DOTALL | re.MULTILINE)
    assert found, f"{function.__name__} has no section {title}"
    return found[1]


def test_signatures():
    actual = []
    for name in FUNCTIONS:
        signature = inspect.signature(getattr(nk, name))
        parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
        actual.append(name + str(inspect.Signature(parameters)))
    assert actual == SIGNATURES.strip().split("\n")


def test_names():
    assert sorted(nk.__all__) == sorted([*FUNCTIONS, "Moments", "__version__", "cuda", "moments", "nn"])
    for name in FUNCTIONS:
        assert getattr(nk, name) is getattr(functional, name)
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", nk.__version__)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstring(name):
    function = getattr(nk, name)
    parameters = list(inspect.signature(function).parameters)
    if parameters:
        documented = re.findall(r"^(\w[\w, ]*?)(?: :|$)", section(function, "Parameters"), re.MULTILINE)
        assert sorted(", ".join(documented).split(", ")) == sorted(parameters)
        raised = section(function, "Raises")
        assert "TypeError" in raised
        assert "ValueError" in raised
    if not name.startswith(("get_", "set_")):
        assert "https://arxiv.org/abs/" in section(function, "References")
        section(function, "Returns")
    assert ">>>" in section(function, "Examples")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_examples(name):
    """Each example stands alone: it imports what it uses."""
    finder = doctest.DocTestFinder(recurse=False)
    (test,) = finder.find(getattr(nk, name), name, globs={})
    log = []
    doctest.DocTestRunner().run(test, out=log.append)
    assert not log, "".join(log)


def blocks_of(page):
    """The examples of a page: (line number, packages needed, code)."""
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        needs = [] if found["needs"] is None else found["needs"].split(", ")
        yield text.count("\n", 0, found.start("code")) + 1, needs, found["code"]


def runs_of_pages():
    """Each page without optional packages, and once more with each set of them that some of its blocks ask for."""
    return [
        pytest.param(page, needs, id="-".join([page.stem, *needs]), marks=[pytest.mark.gpu] if "cuda" in needs else [])
        for page in PAGES
        for needs in dict.fromkeys([(), *(tuple(needs) for _, needs, _ in blocks_of(page))])
    ]


# Python 3.12 and later warn of a fork beside threads, which is what docs/threads.md shows.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(("page", "needs"), runs_of_pages())
def test_pages(page, needs, tmp_path, monkeypatch):
    """The blocks of a page run in order and share their names; one that starts with >>> is compared with its output."""
    for package in needs:
        if package != "cuda":
            pytest.importorskip(package)
        if "cuda" in needs and package in gpu.LIBRARIES and gpu.LIBRARIES[package].absent:
            pytest.skip(gpu.LIBRARIES[package].absent)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page.stem}
    for line, needed, code in blocks_of(page):
        if not set(needed) <= set(needs):
            continue
        if not code.startswith(">>>"):
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)
            continue
        test = doctest.DocTestParser().get_doctest(code, names, page.name, str(page), line - 1)
        log = []
        doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=log.append, clear_globs=False)
        assert not log, "".join(log)
        names = test.globs


def test_every_page_has_its_examples():
    """A page whose blocks are not found would pass unseen."""
    with_examples = {page.stem for page in PAGES if any(True for _ in blocks_of(page))}
    assert with_examples >= {"README", "index", "norms", "arrays", "training", "threads"}
    for page in PAGES:
        assert page.read_text(encoding="utf-8").count("```python") == len(list(blocks_of(page)))
