"""The kernels' own tests, those that say most, with Triton compiling: shared out to processes on one GPU.

Here: which tests, running them, what each came to; pytest loads this file as a plugin for that.
Not here: the tests (tests/). They come with a checkout, not with an installed wheel.
"""

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wherefrom.tools.gpu_check.sharing import BROKEN_GPU, add_line, gpu_is_broken, share_out
from wherefrom.tools.gpu_check.stages import Options, Report

PROCESSES = 8
HANGS_S = 60  # after which pytest shows where a test stands
WORDS = 2000  # characters kept of a failed test's words

# kernel x dtype x path, the likeliest to break first: processes take every eighth. dtype0, 1, 2 are float32, bfloat16, float16
CHOSEN = (
    "test_roi_align.py::test_outputs_and_gradients_are_as_exact_as_eager[adaptive-7-37-dtype2-triton]",
    "test_roi_align.py::test_outputs_and_gradients_are_as_exact_as_eager[adaptive-7-37-dtype1-triton]",
    "test_roi_align.py::test_outputs_and_gradients_are_as_exact_as_eager[adaptive-7-37-dtype0-triton]",
    "test_pair_loss_triton.py::test_loss_and_gradients_are_those_of_float64[gelu-squared-all]",
    "test_pair_loss_triton.py::test_loss_and_gradients_are_those_of_float64[gelu-gaussian_nll-disjoint]",
    "test_render_views_triton.py::test_all_photometrics_in_every_output_equal_the_reference[planar-torch.float32]",
    "test_render_views_triton.py::test_every_orientation_mirror_and_turn_equals_the_reference",
    "test_pair_targets_paths.py::test_the_kernel_gives_every_option[False-view-log_area-reference]",
    "test_roi_align.py::test_outputs_and_gradients_are_as_exact_as_eager[adaptive-1-384-dtype2-triton]",
    "test_roi_align.py::test_outputs_and_gradients_are_as_exact_as_eager[adaptive-1-384-dtype1-triton]",
    "test_roi_align.py::test_outputs_and_gradients_are_as_exact_as_eager[adaptive-1-384-dtype0-triton]",
    "test_pair_loss_triton.py::test_loss_and_gradients_are_those_of_float64[gelu-huber-list]",
    "test_pair_loss_triton.py::test_loss_and_gradients_are_those_of_float64[relu-l1-others]",
    "test_render_views_triton.py::test_all_photometrics_in_every_output_equal_the_reference[planar-torch.bfloat16]",
    "test_render_views_triton.py::test_all_photometrics_in_every_output_equal_the_reference[channels last-torch.uint8]",
    "test_pair_targets_paths.py::test_all_38416_pairs_of_a_vit",
    "test_roi_align.py::test_outputs_and_gradients_are_as_exact_as_eager[area-7-37-dtype2-triton]",
    "test_roi_align.py::test_outputs_and_gradients_are_as_exact_as_eager[area-7-37-dtype1-triton]",
    "test_roi_align.py::test_outputs_and_gradients_are_as_exact_as_eager[area-7-37-dtype0-triton]",
    "test_pair_loss_triton.py::test_activations_are_exact_to_rounding[gelu-2-3]",
    "test_pair_loss_triton.py::test_activations_are_exact_to_rounding[gelu_tanh-2-3]",
    "test_render_views_triton.py::test_all_photometrics_in_every_output_equal_the_reference[channels last-torch.float16]",
    "test_render_views_triton.py::test_hostile_numbers_end_and_touch_nothing_else",
    "test_pair_targets_paths.py::test_every_output_is_written",
    "test_roi_align.py::test_equals_torchvision_on_random_and_adversarial_boxes[adaptive-out_hw0-triton]",
    "test_roi_align.py::test_a_wild_token_spoils_only_the_outputs_that_read_it[nan-triton]",
    "test_roi_align.py::test_a_wild_gradient_spoils_only_the_tokens_that_its_output_read[triton]",
    "test_pair_loss_triton.py::test_every_element_is_written_and_results_repeat_bit_for_bit[all]",
    "test_pair_loss_triton.py::test_every_element_is_written_and_results_repeat_bit_for_bit[list]",
    "test_render_views_triton.py::test_naming_the_views_that_blur_changes_no_bit",
    "test_render_views_triton.py::test_views_of_several_tiles_are_the_same_whatever_the_tiles",
    "test_pair_targets_paths.py::test_the_kernel_repeats_bit_for_bit_and_takes_any_strides",
    "test_roi_align.py::test_strides_of_tokens_and_gradients_do_not_matter[triton]",
    "test_roi_align.py::test_every_element_is_written[3-triton]",
    "test_roi_align.py::test_results_repeat_to_the_bit[triton]",
    "test_pair_loss_triton.py::test_63_boxes_are_those_of_float64",
    "test_pair_loss_triton.py::test_low_precision_inputs_are_computed_in_float32",
    "test_render_views_triton.py::test_the_centered_filter_equals_the_reference",
    "test_render_views_triton.py::test_a_whole_long_picture_in_one_pixel_is_its_weighted_mean",
    "test_pair_targets_paths.py::test_the_kernel_gives_every_option[True-source-ratio-mean]",
    "test_roi_align.py::test_mirrors_and_turns_equal_flip_and_rot90_exactly[adaptive-out_hw1-triton]",
    "test_roi_align.py::test_maps_of_any_size_are_as_exact_as_eager[shape0-triton]",
    "test_roi_align_triton.py::test_tables_of_weights_equal_the_torch_path_to_the_bit[True-0]",
    "test_pair_loss_triton.py::test_how_the_work_is_cut_changes_nothing_but_rounding[True-all]",
    "test_pair_loss_triton.py::test_a_pair_that_names_no_box_makes_the_loss_nan_and_reads_nothing",
    "test_render_views_triton.py::test_blurs_wider_than_the_view_and_at_whole_radii_equal_the_reference[size_px0-1.3]",
    "test_render_views_triton.py::test_extreme_pictures_and_views_equal_the_reference[(1, 1)-(3, 8000)]",
    "test_pair_targets_paths.py::test_a_pair_that_names_no_box_reads_nothing",
    "test_roi_align_pairs.py::test_equals_pooling_and_targets_apart[True-plain-triton]",
    "test_roi_align_pairs.py::test_the_gradient_is_that_of_pooling_alone_and_targets_have_none[dtype1-triton]",
    "test_roi_align_pairs.py::test_every_element_is_written_and_repeats_to_the_bit[triton]",
    "test_pair_loss_triton.py::test_without_gradients_only_the_loss_is_computed",
    "test_pair_loss.py::test_autocast_leaves_the_mathematics_alone",
    "test_render_views.py::test_triton_is_reached_by_name",
    "test_roi_align_triton.py::test_tables_of_weights_equal_the_torch_path_to_the_bit[True--1]",
    "test_pair_targets_paths.py::test_gradients_of_any_order_reach_the_boxes",
    "test_roi_align.py::test_compiles_into_one_graph[False-triton]",
    "test_pair_loss.py::test_compiles_without_a_break[True]",
    "test_pair_targets_paths.py::test_compiled_whole_it_gives_the_same[triton]",
    "test_roi_align.py::test_second_gradients_equal_those_of_the_definition[triton]",
)
DRY_RUN_TESTS = ("test_pair_targets_paths.py::test_the_kernel_gives_every_option[False-view-log_area-reference]",)  # by a dry run


def kernel_tests(options: Options, report: Report) -> None:
    """Run the chosen tests; the report names each that does not pass, with its last words."""
    root = Path(__file__).resolve().parents[2]
    chosen = [f"tests/{name}" for name in (DRY_RUN_TESTS if options.dry_run else CHOSEN)]
    if missing := sorted({name.partition("::")[0] for name in chosen if not (root / name.partition("::")[0]).is_file()}):
        report.fail(f"{root} has no {missing[0]}: the kernels' tests come with a checkout, not with an installed wheel")
        return
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # of what else is installed there
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    with tempfile.TemporaryDirectory() as folder:
        processes = 1 if options.dry_run else PROCESSES
        lines = share_out(chosen, _command, processes=processes, seconds=report.seconds_left - 5, folder=Path(folder), cwd=root)
    outcomes = {name: "died" if "died" in line else line["outcome"] for name, line in lines.items()}
    outcomes |= {name: "no time was left" for name in chosen if name not in lines}
    report.add("outcomes", outcomes)
    report.add("seconds", {name: round(line["seconds"], 1) for name, line in lines.items() if "seconds" in line})
    report.add("words", {name: line["words"] for name, line in lines.items() if line.get("words")})
    for name, outcome in outcomes.items():
        if outcome != "passed":
            report.fail(f"{name}: {outcome}" + (f" with exit code {lines[name]['died']}" if outcome == "died" else ""))
    report.say(", ".join(f"{count} {outcome}" for outcome, count in Counter(outcomes.values()).most_common()))


def _command(names: Sequence[str]) -> list[str]:
    options = [
        "-q",
        "--tb=short",
        "-o",
        "addopts=",  # those of pyproject.toml want pytest-xdist, which that machine may lack
        "--import-mode=importlib",
        "-p",
        "no:cacheprovider",
        "-p",
        "wherefrom.tools.gpu_check.chosen_tests",
        "-o",
        f"faulthandler_timeout={HANGS_S}",
    ]
    return [sys.executable, "-P", "-m", "pytest", *options, *names]


def pytest_runtest_logreport(report: Any) -> None:
    """Add a test's line once it has run, failed before, or was skipped (pytest's hook)."""
    if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
        words = "" if report.outcome == "passed" else str(report.longrepr)[-WORDS:]
        add_line(report.nodeid, outcome=report.outcome, seconds=report.duration, words=words)
        if gpu_is_broken(words):
            os._exit(BROKEN_GPU)  # the tests after it would fail of it too
