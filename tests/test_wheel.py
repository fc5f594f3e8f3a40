"""The wheel holds what a user needs, configs included, and nothing of tests or tools."""

import subprocess
import sys
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def test_the_wheel_runs_from_a_clean_folder(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(REPOSITORY)], check=True, timeout=120)
    (wheel,) = tmp_path.glob("frepa-*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist() if "dist-info" not in name}
        data = ("cluster/planning/gpus.yaml", "frepa_dist/evaluate/suite/published.yaml")
        assert set(data) <= set(archive.namelist())
        assert tops == {"cluster", "configs", "frepa_dist", "shards"}
        assert "frepa_dist/evaluate/datasets/recipes/drive.yaml" in archive.namelist()
        assert "frepa_dist/evaluate/suite/published.yaml" in archive.namelist()
        archive.extractall(site)
    # -S and a path of its own: the checkout, installed in editable mode, must not help
    code = (
        "import sys, site, sysconfig; sys.path[:0] = [sys.argv.pop(1)]\n"
        "sys.path.append(sysconfig.get_paths()['purelib'])\n"
        "import cluster.cli, shards.support.settings as s, cluster.monitoring.render as m\n"
        "from pathlib import Path; m.render(Path('monitoring'), m.Places(Path('targets')))\n"
        "print(cluster.cli.__file__, s.find_config('demo/retmae'))"
    )
    run = [sys.executable, "-S", "-c", code, str(site)]
    result = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(str(site)) == 2
    rendered = {path.name for path in (tmp_path / "monitoring").rglob("*.*")}
    assert {"prometheus.yml", "alerts.yml", "run.json"} <= rendered
