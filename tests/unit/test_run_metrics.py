"""A run's metrics for Prometheus."""

from lorapar_ray.run_metrics import report_figures, report_progress


def test_names_outside_ascii_do_not_break_a_run(monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    report_progress("größe", "sft × 4", 8)(3)
    report_figures("größe", "sft")({"loss": 1.0})
