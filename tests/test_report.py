"""The report: what a reader is told, what is refused, and that the page stands alone."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
from result_factory import (
    make_cohort,
    make_config,
    make_excluded,
    make_provenance,
    make_result,
    make_unsealed,
    with_metric,
    with_part,
)

from lbp_ray.report import render_console, write_report
from lbp_ray.report.__main__ import main
from lbp_ray.report.curves import draw_learning, draw_precision_recall
from lbp_ray.report.figures import draw_permutation
from lbp_ray.report.optimism import MARK
from lbp_ray.report.readers import cohort_sentences
from lbp_ray.report.rules import draw_rules
from lbp_ray.report.theme import COLOURS
from lbp_ray.report.verdict import verdict_sentences
from lbp_ray.report.words import METRIC_LABELS
from lbp_ray.result import METRIC_NAMES, Confusion

FIGURES = {
    "overview", "metrics", "roc", "precision_recall", "scores", "learning", "confusion", "folds", "permutation",
    "fold_choices", "rules", "or_rule",
}  # fmt: skip
TABLES = {
    "metrics", "table3", "table4", "table5", "agreement", "protocol", "other_level", "areas", "comparisons",
    "variance", "epochs", "fold_ranges", "fold_choices", "protocols", "rules", "or_rule", "choices",
}  # fmt: skip
VOID = {"meta", "img", "br", "hr", "link", "input", "path", "use", "stop", "rect"}
PNG = b"\x89PNG\r\n\x1a\n" + bytes(16)


class Page(HTMLParser):
    """Collects what the assertions ask of a page, and the tags that do not nest."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.ids, self.headings, self.faults, self.text = [], [], [], [], ""
        self.references, self._open = [], []
        self.feed(text)
        self.faults += [f"never closed: {tag}" for tag in self._open]

    def handle_starttag(self, tag, attributes):
        self.note(tag, dict(attributes))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.note(tag, dict(attributes))

    def note(self, tag, attributes):
        self.tags.append((tag, attributes))
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.references += [attributes[name] for name in ("src", "href", "srcset", "action") if name in attributes]
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))

    def handle_endtag(self, tag):
        if tag not in VOID and (not self._open or self._open.pop() != tag):
            self.faults.append(f"misplaced </{tag}> at {self.getpos()}")

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def result():
    return make_result()


@pytest.fixture(scope="module")
def folder(result, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(result, folder, contact_sheet=PNG)
    return folder


@pytest.fixture(scope="module")
def html(folder):
    return (folder / "report.html").read_text()


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def csv_rows(folder, name):
    return list(csv.DictReader(io.StringIO((folder / f"tables/{name}.csv").read_text())))


SAME_FOLD = {"threshold_source": "same_fold"}


def with_fold_interval(result):
    choices = list(result.slice_counts[0].choices)
    choices[0] = choices[0].model_copy(update={"metrics": result.slice_counts[0].metrics})
    return with_part(result, choices=tuple(choices))


def test_page_shows_every_metric_with_its_figures(page, result):
    for part in result.slice_counts:
        for metric in (*part.metrics, part.accuracy, part.separation):
            interval = metric.interval
            assert METRIC_LABELS[metric.name] in page.text
            assert f"{metric.estimate:.3f}{interval.low:.3f} to {interval.high:.3f}" in page.text
            assert f"{metric.mean:.3f} ± {metric.sd:.3f}" in page.text


def test_page_opens_with_verdict_then_statements_then_metrics(page, result):
    order = [verdict_sentences(result)[0], *result.statements, "average precision"]
    body = page.text[page.text.index("out-of-fold study report") :]
    places = [body.index(text) for text in order]
    assert places == sorted(places)


def test_page_is_well_formed_and_accessible(page):
    assert page.faults == []
    assert [name for name, count in Counter(page.ids).items() if count > 1] == []
    assert page.headings[0] == 1
    assert page.headings.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(page.headings, page.headings[1:], strict=False))
    pictures = [attributes["aria-label"] for tag, attributes in page.tags if attributes.get("role") == "img"]
    assert len(pictures) == len(FIGURES)
    assert all(len(alt) > 40 for alt in pictures)
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")
    local = {reference[1:] for reference in page.references if reference.startswith("#")}
    assert local <= set(page.ids)


def test_page_fetches_nothing_and_runs_nothing(html, page):
    assert not re.search(r"https?://|@import|<script|javascript:", html)
    assert all(reference.startswith(("#", "data:image/png;base64,")) for reference in page.references)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))


def test_figures_and_tables_carry_the_hash(folder, page, result):
    short = result.result_hash[:12]
    assert {path.stem for path in (folder / "figures").iterdir()} == FIGURES
    assert {path.name for path in (folder / "tables").iterdir()} == {f"{n}.{k}" for n in TABLES for k in ("csv", "md")}
    for path in folder.rglob("*.*"):
        assert short in path.read_text(), path.name
    captions = sum(tag == "caption" for tag, _ in page.tags)
    assert page.text.count(f"Result {short}") == captions + 1
    assert short in render_console(result)


def test_figure_colours_follow_the_page_theme(html):
    inline = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert set(re.findall(r"#[0-9a-f]{6}\b", inline)) == set()
    themes = [block for block in re.findall(r":root \{(.*?)\}", html, re.DOTALL) if "--ink" in block]
    assert len(themes) == 3, "light, dark, print"
    assert all(f"--{colour}:" in block for block in themes for colour in COLOURS)


def test_precision_recall_figure_has_the_prevalence_line(folder, html, result):
    drawn = [line for axis in draw_precision_recall(result).axes for line in axis.lines if line.get_gid()]
    assert [set(line.get_ydata()) for line in drawn] == [{64 / 160}] * 3
    svg = (folder / "figures" / "precision_recall.svg").read_text()
    for part in result.slice_counts:
        assert f'id="prevalence-{part.num_slices}"' in svg
        assert f'id="precision_recall-prevalence-{part.num_slices}"' in html


def test_same_result_gives_same_bytes(folder, result, tmp_path):
    write_report(make_result(), tmp_path, contact_sheet=PNG)
    first = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}
    assert {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.*")} == first


def test_user_matplotlib_settings_change_nothing(result, folder, tmp_path):
    import matplotlib as mpl

    with mpl.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "none"}):
        write_report(result, tmp_path)
        assert mpl.rcParams["font.size"] == 30
    assert (tmp_path / "figures/roc.svg").read_bytes() == (folder / "figures/roc.svg").read_bytes()


def test_names_from_outside_are_escaped(tmp_path):
    evil = "<script>alert(1)</script>\"'&\x1b[31m"
    result = make_result(name=evil, statements=(evil,), config={evil: {evil: evil}}, groups={evil: 3})
    html = write_report(result, tmp_path).read_text()
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert Page(html).faults == []
    assert "\x1b" not in render_console(result)
    assert "<script" not in (tmp_path / "tables/metrics.md").read_text()


def test_csv_keeps_full_precision(folder, result):
    rows = list(csv.DictReader(io.StringIO((folder / "tables/metrics.csv").read_text())))
    assert len(rows) == len(result.slice_counts) * 10
    for part in result.slice_counts:
        for metric in part.metrics:
            row = next(r for r in rows if (int(r["num_slices"]), r["metric"]) == (part.num_slices, metric.name))
            assert float(row["estimate"]) == metric.estimate
            assert (float(row["seed_sd"]), float(row["seed_se"])) == (metric.sd, metric.se)
            assert tuple(map(float, row["per_seed"].split(";"))) == metric.per_seed


@pytest.mark.parametrize("counts", [(3,), (1, 3, 5), (1, 3, 5, 7, 9)], ids=str)
def test_console_shows_all_within_its_width(counts):
    result = make_result(counts, (0.9,) * len(counts))
    text = render_console(result)
    assert max(map(len, text.splitlines())) <= 100
    for part in result.slice_counts:
        for metric in part.metrics:
            interval = metric.interval
            assert f"{metric.estimate:.2f} [{interval.low:.2f}, {interval.high:.2f}] ±{metric.sd:.2f}" in text
    for wanted in ("Bayes-optimal", "0.96", "permutation p", "200 shuffles", "conditional on the trained models"):
        assert wanted in text


def test_console_without_seeds_bayes_or_permutations():
    bare = make_result((1,), num_seeds=1, bayes=None)
    text = render_console(with_part(bare, permutation=None))
    assert "Bayes" not in text
    assert "±0" not in text
    assert "No permutation test was run." in text


def test_page_counts_crop_sources_and_says_that_they_do_not_know_the_label(page):
    text = page.text.replace("\u00a0", " ")
    assert "not distinguishable between symptomatic and asymptomatic studies (p = 0.970, 4999 shuffles" in text
    rows = {
        "placed or corrected by hand": (2, 1),
        "final segmenter": (38, 25),
        "segmenter, out of fold": (56, 38),
        "no crop: roi_several_components": (1, 1),
    }
    for name, (negative, positive) in rows.items():
        assert f"{name}{negative}{positive}" in text
    assert "Dice of 0.951 (standard error ± 0.002 over 110 images and ± 0.004 over 5 folds)" in text
    assert "a fixed mean box reaches 0.712. Its centroids are off by 1.4 mm (median) and 3.9 mm" in text


def test_sources_that_know_the_label_are_in_the_verdict(result):
    assert "crops" not in " ".join(verdict_sentences(result))
    biased = result.model_copy(update={"crops": make_provenance(p_value=0.0002)})
    text = " ".join(verdict_sentences(biased)).replace("\u00a0", " ")
    assert "Warning: the sources of the crops (placed or corrected by hand, final segmenter and segmenter, out" in text
    assert "differ between symptomatic and asymptomatic studies (p < 0.001" in text
    assert "Warning" in render_console(biased)


def test_crops_of_one_source_and_results_without_any(result, tmp_path):
    sources = make_provenance().sources[:1]
    one = make_provenance(sources=sources, statistic=None, p_value=None, segmenter=None, excluded=())
    page = Page(write_report(result.model_copy(update={"crops": one}), tmp_path / "one").read_text())
    assert "All crops have one source, placed or corrected by hand: it cannot tell the classes apart." in page.text
    page = Page(write_report(result.model_copy(update={"crops": None}), tmp_path / "none").read_text())
    assert page.faults == []
    assert "crops" not in page.ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.model_copy(update={"slice_counts": ()}), "at least one slice count is required"),
        (lambda r: with_metric(r, "mcc", mean=float("nan")), r"slice_counts\[0\]\.metrics\[7\]\.mean: a finite number"),
        (lambda r: with_part(r, 1, scores_positive=(float("inf"),)), r"slice_counts\[1\]\.scores_positive\[0\]"),
        (lambda r: with_part(r, metrics=r.slice_counts[0].metrics[1:]), "metric 'average_precision' is missing"),
        (lambda r: with_part(r, num_slices=3), "3 slices appear 2 times"),
        (lambda r: r.model_copy(update={"comparisons": r.comparisons[1:]}), "every pair of slice counts is required"),
        (lambda r: with_part(r, scores_negative=()), "scores_negative is empty"),
        (
            lambda r: with_part(r, confusion=Confusion(tp=1, fp=1, fn=1, tn=1)),
            "holds 64 scores, the confusion matrix 2",
        ),
        (lambda r: with_metric(r, "recall", interval=None), "metric 'recall' has no interval, which an honest result"),
        (lambda r: with_fold_interval(r), "fold 0 taken alone has an interval"),
        (lambda r: r.model_copy(update=SAME_FOLD), "an optimistic result has none, found"),
        (
            lambda r: r.model_copy(update=SAME_FOLD | {"comparisons": ()}),
            "metric 'recall' has an interval, which an optimistic result must not have",
        ),
        (
            lambda r: make_result(optimistic=True, rules=r.rules),
            "rule 'any' has an interval, which an optimistic result must not have",
        ),
        (lambda r: with_part(r, roc=r.slice_counts[0].roc.model_copy(update={"x": (0.0,)})), "roc needs two or more"),
    ],
    ids=[
        "no slice count",
        "NaN",
        "infinite",
        "metric",
        "twice",
        "pair",
        "one class",
        "confusion",
        "honest without",
        "fold",
        "optimistic pair",
        "optimistic interval",
        "optimistic rule",
        "curve",
    ],
)
def test_unreportable_results_are_refused(result, tmp_path, change, message):
    broken = change(result)
    with pytest.raises(ValueError, match=message) as error:
        write_report(broken, tmp_path)
    assert "run the aggregation again" in str(error.value)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=message):
        render_console(broken)


def test_contact_sheet_must_be_png(result, tmp_path):
    with pytest.raises(ValueError, match="bytes of a PNG"):
        write_report(result, tmp_path, contact_sheet=b"GIF89a")


@pytest.mark.parametrize("counts", [(1,), (1, 3, 5, 7)], ids=str)
def test_unusual_results_render_whole(counts, tmp_path):
    result = make_result(counts, (0.9,) * len(counts), num_seeds=1, bayes=None, funnel=(), groups={}, acquisition={})
    tested = with_part(result, permutation=None, fold_auc=())
    page = Page(write_report(tested, tmp_path).read_text())
    assert page.faults == []
    assert not (tmp_path / "figures/folds.svg").exists()
    assert (tmp_path / "figures/permutation.svg").exists() == (len(counts) > 1)
    assert {reference[1:] for reference in page.references} <= set(page.ids)


def test_command_renders_a_saved_result_again(result, folder, tmp_path, capsys):
    result.save(tmp_path / "result.json")
    (tmp_path / "sheet.png").write_bytes(PNG)
    out = tmp_path / "again"
    sheet = ["--contact-sheet", str(tmp_path / "sheet.png")]
    assert main([str(tmp_path / "result.json"), "--out", str(out), *sheet]) == 0
    assert (out / "report.html").read_bytes() == (folder / "report.html").read_bytes()
    printed = capsys.readouterr().out
    assert render_console(result) in printed
    assert printed.endswith(f"report: {out / 'report.html'}\n")


def test_command_explains_what_it_cannot_read(tmp_path, capsys):
    assert main([str(tmp_path / "absent.json"), "--out", str(tmp_path)]) == 2
    assert "absent.json" in capsys.readouterr().err


def test_factory_scores_agree_with_its_auc(result):
    part = result.slice_counts[0]
    positive, negative = np.asarray(part.scores_positive), np.asarray(part.scores_negative)
    wins = (positive[:, None] > negative).mean()
    assert next(metric for metric in part.metrics if metric.name == METRIC_NAMES[1]).estimate == pytest.approx(wins)


@pytest.fixture(scope="module")
def optimistic():
    return make_result(optimistic=True)


@pytest.fixture(scope="module")
def optimistic_folder(optimistic, tmp_path_factory):
    folder = tmp_path_factory.mktemp("optimistic")
    write_report(optimistic, folder, contact_sheet=PNG, excluded=make_excluded(optimistic))
    return folder


def test_optimistic_page_says_first_what_was_chosen_and_why_nothing_is_concluded(optimistic, optimistic_folder):
    page = Page((optimistic_folder / "report.html").read_text())
    body = page.text[page.text.index("out-of-fold study report") :].replace("\n", " ")
    order = [
        "Optimistic: these figures are no evidence.",
        "The epoch and threshold of every fold were chosen on that very fold",
        "No interval, no verdict and no comparison",
        "reach a balanced accuracy of 0.60 on average",
        *optimistic.statements,
        "does not say which",
        "average precision",
    ]
    places = [body.index(text) for text in order]
    assert places == sorted(places)
    assert page.faults == []
    assert {reference[1:] for reference in page.references if reference.startswith("#")} <= set(page.ids)


def test_optimistic_report_holds_no_interval_and_no_verdict(optimistic_folder):
    text = Page((optimistic_folder / "report.html").read_text()).text
    for barred in (
        "better than chance",
        "distinguishable here",
        "conditional on the trained models",
        "95\u202f%",
        "shuffles + 1",
    ):
        assert barred.lower() not in text.replace("\u00a0", " ").lower(), barred
    for name in ("metrics", "table5", "other_level", "fold_choices"):
        for row in csv_rows(optimistic_folder, name):
            assert (row.get("low", ""), row.get("high", "")) == ("", ""), name
            assert (row["selection"], row["threshold_source"], row["level"]) == ("same_fold", "same_fold", "study")
    assert all(row["recall_low"] == row["roc_auc_low"] == "" for row in csv_rows(optimistic_folder, "rules"))
    assert {row["optimistic"] for row in csv_rows(optimistic_folder, "metrics")} == {"true"}


def test_optimistic_figures_and_tables_carry_their_mark(optimistic, optimistic_folder, folder):
    drawn = {path.stem for path in (optimistic_folder / "figures").iterdir()}
    assert drawn == FIGURES - {"overview"} | {"excluded_scores"}
    assert all(MARK in (optimistic_folder / f"figures/{name}.svg").read_text() for name in drawn)
    assert not any(MARK in path.read_text() for path in (folder / "figures").iterdir())
    page = Page((optimistic_folder / "report.html").read_text())
    assert all(MARK in a["aria-label"].lower() for _, a in page.tags if a.get("role") == "img")
    assert not list((optimistic_folder / "tables").glob("comparisons.*"))
    scored = TABLES - {"table3", "table4", "agreement", "protocol", "choices", "metrics", "comparisons"}
    scored |= {"excluded"}
    assert all(MARK in (optimistic_folder / f"tables/{name}.md").read_text().lower() for name in scored)
    assert {row["threshold_source"] for row in csv_rows(optimistic_folder, "excluded")} == {"same_fold"}
    assert "are recall and 1 − specificity, judged by what was chosen on the very same fold" in page.text
    assert "these figures are no evidence" in (optimistic_folder / "tables/metrics.md").read_text()


def test_optimistic_figures_print_no_p_value(optimistic, result):
    told = [
        [text.get_text() for axis in draw_permutation(of).axes for text in axis.texts] for of in (optimistic, result)
    ]
    assert ["p\u00a0=" in " ".join(texts) for texts in told] == [False, True]


def test_optimistic_console_warns_before_any_figure(optimistic):
    text = render_console(optimistic)
    assert text.index("! Optimistic") < text.index("average precision")
    assert "[" not in text
    assert "permutation p" not in text
    assert "epochs: chosen on the evaluated fold; thresholds: fitted on the evaluated fold" in text


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, "reach a balanced accuracy of 0.60 on average in the frozen stage"),
        ({"permutation": None}, "know nothing reach a balanced accuracy of about 0.62"),
    ],
    ids=["measured", "never measured"],
)
def test_optimism_is_measured_or_told_in_general(change, told):
    assert told in " ".join(verdict_sentences(with_part(make_result((3,), (0.9,), optimistic=True), **change)))


@pytest.mark.parametrize(("change", "reached"), [({}, "0.52 on average"), ({"permutation": None}, "about 0.52")])
def test_epoch_alone_makes_a_result_optimistic_and_labels_that_know_nothing_little_better(change, reached):
    result = make_result((3,), (0.9,), optimistic=True, threshold_source="cross_fitted")
    text = " ".join(verdict_sentences(with_part(result, **change)))
    assert "The epoch of every fold was chosen on that very fold" in text
    assert f"reach a balanced accuracy of {reached}" in text


@pytest.mark.parametrize("change", [{}, {"permutation": None}], ids=["with shuffles", "without"])
@pytest.mark.parametrize(
    "unlike",
    [
        {"evaluation": {"threshold_criterion": "max_mcc"}},
        {"evaluation": {"threshold_level": "slice", "ensemble_threshold": "mean_of_seeds"}},
        {"evaluation": {"level": "slice"}},
        {"recipe": {"checkpoint": "min_loss"}},
        {"recipe": {"checkpoint_top_k": 5}},
        {"recipe": {"frozen_epochs": 0}},
        {"recipe": {"selection": "inner_validation"}},
    ],
    ids=lambda unlike: next(iter(next(iter(unlike.values())))),
)
def test_shuffles_that_were_judged_otherwise_give_no_figure(unlike, change):
    chosen = {"selection": "same_fold"} | unlike.get("recipe", {})
    judged = {"threshold_source": "same_fold"} | unlike.get("evaluation", {})
    told = {"config": make_config(recipe=chosen, evaluation=judged), "selection": chosen["selection"]}
    text = " ".join(verdict_sentences(with_part(make_result((3,), (0.9,), optimistic=True, **told), **change)))
    section, settings = next(iter(unlike.items()))
    key, value = next(iter(settings.items()))
    assert f"was not measured for this recipe (recipe.{key}: {value})".replace("recipe.", f"{section}.", 1) in text
    assert "balanced accuracy of" not in text


def test_threshold_alone_makes_a_result_optimistic():
    result = make_result((3,), (0.9,), optimistic=True, selection="fixed_epochs")
    text = " ".join(verdict_sentences(result))
    assert "The threshold of every fold was chosen on that very fold" in text
    assert "balanced accuracy of 0.57 on average" in text


def test_thesis_tables_have_both_denominators_and_every_count(folder):
    groups = {row["group"]: row for row in csv_rows(folder, "table3")}
    assert {name: int(row["subjects"]) for name, row in groups.items()}["slightly_symptomatic"] == 363
    slight = "| slightly symptomatic | 363 | 25 % | 26 % |"
    assert slight in (folder / "tables/table3.md").read_text().replace("\u202f", " ")
    assert groups["not_enough_data"]["share_complete"] == ""
    discs = {(row["scale"], row["grade"], row["level"]): row["exams"] for row in csv_rows(folder, "table4")}
    assert (discs["pfirrmann", "2", "L4-L5"], discs["modic", "1", "L5-S1"]) == ("180", "31")


def test_table_5_shows_the_spread_that_was_asked_for_and_files_hold_both(result, folder, tmp_path):
    summary = result.slice_counts[0].metrics[1]
    assert f"| ROC-AUC | {summary.mean:.3f} ± {summary.sd:.3f} |" in (folder / "tables/table5.md").read_text()
    told = result.model_copy(update={"config": make_config(evaluation={"spread": "se"})})
    page = Page(write_report(told, tmp_path).read_text())
    assert f"| ROC-AUC | {summary.mean:.3f} ± {summary.se:.3f} |" in (tmp_path / "tables/table5.md").read_text()
    assert f"seeds {summary.mean:.3f} ± {summary.se:.3f}" in page.text
    row = csv_rows(tmp_path, "table5")[1]
    assert (float(row["sd"]), float(row["se"]), row["n"]) == (summary.sd, summary.se, "3")
    assert row["verdict"] == "not distinguishable here"


def test_figures_name_their_counterparts_in_the_thesis(page, tmp_path):
    for numbers in ("16, 17 and 18", "20(a), 21(a) and 22(a)", "20(b), 21(b) and 22(b)", "20(c), 21(c) and 22(c)"):
        assert f"What the Oulu thesis shows in Figures {numbers}, for 1, 3 and 5 slices." in page.text
    assert "in Figure 19" in page.text
    seven = make_result((3, 7), (0.9, 0.9))
    text = Page(write_report(seven, tmp_path).read_text()).text
    assert "What the Oulu thesis shows in Figure 17, for 3 slices." in text


def test_cohort_section_tells_rules_grades_readers_protocol_and_doubles(page, result):
    text = page.text
    assert "37 rows meet more than one rule of the groups (the order of the rules decides), and 0 with complete" in text
    assert "given to 10 discs: look at them" in text
    assert "Where two readers differ, the worse grade counts." in text
    assert "178 exams were searched for images that occur under two patients" in text
    assert "all levels5260.830.79 to 0.8631" in text
    assert "TE112.7 ms112.7 to 120.0 ms21" in text
    doubled = result.duplicates.model_copy(update={"num_pairs": 2, "num_across_folds": 1})
    told = cohort_sentences(result.model_copy(update={"duplicates": doubled, "cohort": make_cohort(num_no_match=1)}))
    assert "1 with complete answers meets none" in told[0]
    assert "2 pairs were found, 1 of them across folds" in told[-1]


def test_one_fold_alone_is_a_range_over_all_folds(folder, result):
    part = result.slice_counts[0]
    values = [metric.estimate for choice in part.choices for metric in choice.metrics if metric.name == "recall"]
    rows = csv_rows(folder, "fold_ranges")
    row = next(row for row in rows if (row["num_slices"], row["metric"]) == ("1", "recall"))
    assert (float(row["lowest"]), float(row["highest"])) == (min(values), max(values))
    assert len(csv_rows(folder, "fold_choices")) == 3 * len(part.choices)
    assert f"{min(values):.2f} to {max(values):.2f}" in (folder / "tables/fold_ranges.md").read_text()


def test_areas_stand_pooled_and_by_fold_beside_what_moves_them(folder, result):
    part = result.slice_counts[0]
    row = csv_rows(folder, "areas")[0]
    assert float(row["pooled"]) == part.metrics[1].estimate
    assert float(row["mean_of_folds"]) == pytest.approx(np.mean(part.fold_auc))
    moved = csv_rows(folder, "variance")[0]
    assert (moved["patient_sd"], moved["fold_sd"], moved["seed_sd"]) == ("0.038", "0.021", "0.009")


def test_scoring_epochs_are_listed_and_marked_on_the_learning_curves(optimistic, optimistic_folder):
    rows = [(row["epoch"], row["stage"], row["trials"]) for row in csv_rows(optimistic_folder, "epochs")]
    assert rows[:2] == [("14", "frozen", "2"), ("21", "unfrozen", "10")]
    marked = [line for axis in draw_learning(optimistic).axes for line in axis.lines if line.get_marker() == "^"]
    assert [line.get_xdata()[0] for line in marked] == [14, 21] * 3


def test_rules_stand_at_equal_false_positive_rates(folder, page, result):
    rows = csv_rows(folder, "rules")
    assert len(rows) == (1 + 4 + 4) * 4
    assert {row["rule"] for row in rows if row["num_slices"] == "1"} == {"any"}
    assert len(draw_rules(result).axes) == 4
    assert "recall at 5 % false positives" in page.text.replace("\u202f", " ")
    alone = csv_rows(folder, "or_rule")[0]
    one = result.slice_counts[0].confusion
    assert float(alone["or_recall"]) == pytest.approx(1 - (one.fn / (one.tp + one.fn)) ** 3)


def test_ways_of_judging_stand_beside_each_other(page):
    for row in ("beforehandfitted on the other folds0.501", "beforehandfitted on the evaluated fold0.574"):
        assert row in page.text
    assert "chosen on the evaluated foldfitted on the evaluated fold0.603" in page.text


def test_result_of_slices_says_so_and_puts_studies_second(tmp_path):
    result = make_result((1, 3), (0.9, 0.9), level="slice")
    text = Page(write_report(result, tmp_path).read_text()).text
    for told in (
        "One score per slice",
        "Slice-level out-of-fold scores",
        "Secondary: one score per study",
        "480 with 3",
    ):
        assert told in text
    assert "By the ROC-AUC of study scores" in text
    assert not (tmp_path / "figures/or_rule.svg").exists()


def test_sealed_hold_out_is_told_to_be_sealed(page):
    assert "Sealed. This report knows of no opening." in page.text


def test_study_without_hold_out_claims_none(tmp_path):
    text = Page(write_report(make_result((3,), (0.9,), num_holdout_studies=0), tmp_path).read_text()).text
    assert "No hold-out was kept." in text
    assert "Sealed." not in text


def test_opened_hold_out_tells_who_when_and_what(result, tmp_path):
    secret = make_unsealed(result).opening.model_copy(update={"studies": ("study-secret",)})
    opened = [make_unsealed(result, number=2), make_unsealed(result, opening=secret)]
    text = Page(write_report(result, tmp_path, unsealed=opened).read_text()).text
    for told in (
        f"Opened by radiologist1 at 2026-03-01T10:00:00Z for result {result.result_hash[:12]}, line 1"
        " of the ledger of all studies.",
        "16 studies, 6 symptomatic, scored by the mean of 4 folds × 3 seeds",
        "2 sealed studies have no crop",
        "Warning: this is opening number 2",
        "judged by one validation fold's networks and threshold alone",
    ):
        assert told in text
    assert text.count("Warning: this is opening") == 1
    assert "Sealed." not in text
    assert "secret" not in text
    summary = opened[0].slice_counts[0].metrics[1]
    row = csv_rows(tmp_path, "holdout1")[1]
    assert (float(row["low"]), float(row["high"])) == (summary.interval.low, summary.interval.high)
    assert len(csv_rows(tmp_path, "holdout2_folds")) == 3 * 4 * 8


def test_opened_hold_out_of_an_optimistic_study_keeps_its_intervals(optimistic, tmp_path):
    write_report(optimistic, tmp_path, unsealed=[make_unsealed(optimistic)], excluded=make_excluded(optimistic))
    assert MARK not in (tmp_path / "figures/holdout1_curves.svg").read_text()
    assert all(row["low"] for row in csv_rows(tmp_path, "holdout1"))
    for row in (*csv_rows(tmp_path, "holdout1"), *csv_rows(tmp_path, "holdout1_folds")):
        assert (row["selection"], row["network_threshold_source"], row["level"]) == ("same_fold", "same_fold", "study")
    ends = {row["group"]: row["share_low"] for row in csv_rows(tmp_path, "excluded")}
    assert ends["symptomatic"] == ends["asymptomatic"] == ""
    assert float(ends["slightly_symptomatic"]) < 0.4


def test_excluded_groups_stand_beside_the_task_s_own(result, tmp_path):
    page = Page(write_report(result, tmp_path, excluded=make_excluded(result)).read_text())
    text = page.text.replace("\u202f", " ")
    assert "symptomatic/asymptomatic300.450 ± 0.1000.400 / 0.450 / 0.50045 % (37 % to 53 %)" in text
    assert "the mean of 12 networks" in text
    assert "Not scored: 3 (no crop)." in text
    assert "excluded" in page.ids


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (lambda r, o: {"unsealed": [make_unsealed(o)]}, "opening 1 of the hold-out was made for result"),
        (lambda r, o: {"excluded": make_excluded(o)}, "excluded groups was made for result"),
        (lambda r, o: {"unsealed": [make_unsealed(r), make_unsealed(r)]}, "opening 1 of the hold-out is given 2 times"),
    ],
    ids=["opening", "excluded", "twice"],
)
def test_what_belongs_to_another_result_is_refused(result, optimistic, tmp_path, extra, message):
    with pytest.raises(ValueError, match=message):
        write_report(result, tmp_path, **extra(result, optimistic))
    assert list(tmp_path.iterdir()) == []


def test_group_that_judged_an_optimistic_result_may_not_bring_an_interval(optimistic, result, tmp_path):
    foreign = make_excluded(result).model_copy(update={"result_hash": optimistic.result_hash})
    with pytest.raises(ValueError, match="share of 'asymptomatic' has an interval, but this result is optimistic"):
        write_report(optimistic, tmp_path, excluded=foreign)


def test_choices_show_what_differs_from_the_default(page, folder):
    rows = {row["key"]: (row["value"], row["default"], row["differs"]) for row in csv_rows(folder, "choices")}
    assert rows["recipe.frozen_epochs"] == ("20", "40", "yes")
    assert rows["recipe.study_rule"] == ("any", "any", "")
    assert "evaluation.levelX23: " in page.text


def test_settings_that_an_old_result_lacks_are_not_guessed(tmp_path):
    write_report(make_result((3,), (0.9,), config={"recipe": 7}), tmp_path)
    assert {row["value"] for row in csv_rows(tmp_path, "choices")} == {"not recorded"}


def test_command_finds_what_was_opened_beside_the_result(tmp_path):
    result = make_result((3,), (0.9,))
    result.save(tmp_path / "result.json")
    make_unsealed(result).save(tmp_path / "unsealed-01.json")
    make_excluded(result).save(tmp_path / "excluded.json")
    assert main([str(tmp_path / "result.json"), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out/report.html").read_text()
    assert "Opened by radiologist1" in text
    assert "Groups left out" in text
