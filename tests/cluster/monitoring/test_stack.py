"""`frepa monitor`: what is started how, what is said where something is missing, and that all of it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from cluster.launch import free_port
from cluster.monitoring.stack import PROGRAMS, Server, Stack, answers, find_programs, list_servers
from shards.support.errors import EnvironmentFault
from tests.cluster.monitoring.test_servers import MISSING
from tests.commands import frepa

PORTS = {"prometheus": 9090, "alertmanager": 9093, "grafana": 3000}
PAGES = (sys.executable, "-m", "http.server", "--bind", "127.0.0.1")


def test_programs_go_by_any_of_their_names():
    paths = {"prometheus": "/bin/prometheus", "alertmanager": "/bin/alertmanager"}
    assert find_programs(paths.get) == paths
    assert find_programs(lambda name: f"/bin/{name}")["alertmanager"] == "/bin/prometheus-alertmanager"
    with pytest.raises(EnvironmentFault, match="apt-get install prometheus prometheus-alertmanager"):
        find_programs({"grafana": "/bin/grafana"}.get)


def test_all_of_them_listen_on_this_machine_alone(tmp_path):
    programs = {name: f"/bin/{names[0]}" for name, names in PROGRAMS.items()}
    servers = {server.name: server for server in list_servers(programs, tmp_path, PORTS)}
    assert list(servers) == ["prometheus", "alertmanager", "grafana"]
    for name in ("prometheus", "alertmanager"):
        assert f"--web.listen-address=127.0.0.1:{PORTS[name]}" in servers[name].command
    assert "--cluster.listen-address=" in servers["alertmanager"].command
    grafana = servers["grafana"]
    assert grafana.command[:2] == ["/bin/grafana", "server"]
    assert grafana.environment["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    assert grafana.environment["GF_PATHS_PROVISIONING"] == str(tmp_path / "grafana" / "provisioning")
    assert [server.name for server in list_servers({"prometheus": "/bin/p"}, tmp_path, PORTS)] == [
        "prometheus"
    ]


def web(name: str, *command: str) -> Server:
    port = free_port()
    return Server(name, port, "/", [*command, str(port)])


def test_one_that_does_not_start_ends_the_others_and_its_last_words_are_told(tmp_path):
    good = web("good", *PAGES)
    bad = web("bad", sys.executable, "-c", "print('no room'); raise SystemExit(3)")
    stack = Stack([good, bad], tmp_path)
    try:
        with pytest.raises(EnvironmentFault, match="bad has ended with code 3: no room"):
            stack.start()
    finally:
        stack.stop()
    assert not answers(good.url)


def test_one_that_ends_later_is_noticed(tmp_path):
    server = web("good", *PAGES)
    stack = Stack([server], tmp_path)
    others = set(psutil.Process().children())
    try:
        stack.start()
        stack.check()
        (child,) = set(psutil.Process().children()) - others
        child.kill()
        # a zombie whose threads are still ending cannot be waited for yet
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(EnvironmentFault, match="good has ended with code -9"):
            stack.check()
    finally:
        stack.stop()


@pytest.mark.prometheus
@pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")
def test_the_command_runs_until_it_is_told_to_end(tmp_path):
    ports = [free_port() for _ in range(3)]
    command = [sys.executable, "-m", "cluster.cli", "monitor", "up", "--targets", str(tmp_path / "targets")]
    command += ["--data", str(tmp_path / "data"), "--port", str(ports[0])]
    command += ["--alertmanager-port", str(ports[1]), "--grafana-port", str(ports[2])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = ""
        while "Ctrl-C" not in said:
            said += process.stdout.readline()
            assert process.poll() is None
        assert f"prometheus   http://127.0.0.1:{ports[0]}" in said
        assert f"alertmanager http://127.0.0.1:{ports[1]}" in said
        assert answers(f"http://127.0.0.1:{ports[0]}/-/ready")
        assert answers(f"http://127.0.0.1:{ports[1]}/-/ready")
        children = psutil.Process(process.pid).children()
        assert len(children) >= 2
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert not [child for child in children if child.is_running()]
    assert (tmp_path / "targets").is_dir()


@pytest.mark.prometheus
@pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")
def test_a_port_that_is_taken_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = frepa("monitor", "up", "--port", port, "--targets", tmp_path / "t", "--data", tmp_path / "d")
    assert ended.returncode == 5
    assert f"127.0.0.1:{port}: prometheus cannot listen" in ended.stderr
    assert "another --port" in ended.stderr


def test_without_a_prometheus_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    ended = frepa("monitor", "up", "--targets", tmp_path / "t", "--data", tmp_path / "d", PATH=str(tmp_path))
    assert ended.returncode == 5
    assert "apt-get install prometheus" in ended.stderr


def test_files_are_rendered_for_servers_that_run_elsewhere(tmp_path):
    ended = frepa(
        *("monitor", "render", "--out", tmp_path / "out", "--targets", tmp_path / "targets"),
        *("--prometheus", "metrics:9090", "--alertmanager", "alerts:9093"),
    )
    assert ended.returncode == 0, ended.stderr
    files = {
        str(path.relative_to(tmp_path / "out"))
        for path in Path(tmp_path / "out").rglob("*.*")
        if path.is_file()
    }
    assert {"prometheus.yml", "alertmanager.yml", "rules/alerts.yml", "rules/recording.yml"} < files
    source = tmp_path / "out" / "grafana" / "provisioning" / "datasources" / "frepa.yml"
    assert "url: http://metrics:9090" in source.read_text()
    assert "alerts:9093" in (tmp_path / "out" / "prometheus.yml").read_text()
