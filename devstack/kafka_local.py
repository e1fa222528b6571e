"""A real Apache Kafka of one node on loopback, from KAFKA_HOME: broker and controller in one JVM.

For `headrace up --kafka local` and the tests that need a real broker; `python -m devstack.kafka_local` becomes the
JVM. Invariant: the folder keeps the data; a start after any kind of end goes on from it, on whatever port.
"""

import argparse
import base64
import os
import re
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

from core.errors import ConfigError
from devstack.child import tied
from devstack.ports import LOOPBACK
from devstack.processes import ProcessSpec, python_module, tcp_problem

JAVA_MIN = 17
_HEAP = "512m"
_FORMAT_TIMEOUT_SECONDS = 60

# Short sessions: a killed broker is back in about 5 s, where Kafka's defaults take 13.
_PROPERTIES = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@{host}:{controller_port}
controller.listener.names=CONTROLLER
listeners=PLAINTEXT://{host}:{port},CONTROLLER://{host}:{controller_port}
advertised.listeners=PLAINTEXT://{host}:{advertised_port}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs={data}
num.partitions=4
auto.create.topics.enable=false
log.retention.hours=-1
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=1000
group.consumer.min.session.timeout.ms=3000
group.consumer.session.timeout.ms=6000
group.consumer.min.heartbeat.interval.ms=500
group.consumer.heartbeat.interval.ms=1000
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
offsets.topic.num.partitions=4
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
"""
_LOG4J = """\
appender.out.type = Console
appender.out.name = out
appender.out.layout.type = PatternLayout
appender.out.layout.pattern = %d{ISO8601} %p %m (%c)%n
rootLogger.level = WARN
rootLogger.appenderRef.out.ref = out
"""


def kafka_home() -> Path | None:
    """The folder that KAFKA_HOME names, if any."""
    named = os.environ.get("KAFKA_HOME")
    return Path(named).resolve() if named else None


def local_kafka_problem(home: Path | None) -> str | None:
    """Why no local Kafka can be run, or nothing."""
    if home is None:
        return "KAFKA_HOME is not set; unpack Apache Kafka 4 and set KAFKA_HOME to its folder"
    if not any(home.glob("libs/kafka-server-[0-9]*.jar")) and not any(home.glob("libs/kafka_*.jar")):
        return f"KAFKA_HOME={home} has no libs/kafka_*.jar; set it to the folder of an Apache Kafka 4"
    return _java_problem()


def _java() -> str | None:
    named = os.environ.get("JAVA_HOME")
    return shutil.which("java", path=str(Path(named) / "bin")) if named else shutil.which("java")


def _java_problem() -> str | None:
    java = _java()
    if java is None:
        return f"no java found; install Java {JAVA_MIN} or newer (Debian: openjdk-17-jre-headless) or set JAVA_HOME"
    said = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=20, check=False).stderr
    version = re.search(r'version "(\d+)', said)
    if version is None or int(version[1]) < JAVA_MIN:
        return f"{java} is {version[1] if version else 'of an unknown version'}; Java {JAVA_MIN} or newer is needed"
    return None


def local_kafka_spec(
    home: Path | None, folder: Path, port: int, controller_port: int, advertised_port: int = 0
) -> ProcessSpec:
    """The process of a local Kafka whose data lies in `folder`.

    Args:
        home: of the Kafka distribution.
        folder: for data and settings.
        port: where it listens.
        controller_port: where its controller listens.
        advertised_port: where clients are told to come; 0 = where it listens. Another one has something in between.

    Raises:
        ConfigError: no Kafka or no Java; says how to get it.
    """
    if problem := local_kafka_problem(home):
        raise ConfigError(problem)
    arguments = (str(home), str(folder.resolve()), str(port), str(controller_port), str(advertised_port or port))
    return ProcessSpec(
        "kafka",
        python_module("devstack.kafka_local", *arguments),
        check=lambda: tcp_problem(port),
        start_timeout_seconds=90,
        # It hands its log over cleanly; killed, it reads it through at the next start.
        stop_timeout_seconds=20,
    )


def become_broker(home: Path, folder: Path, port: int, controller_port: int, advertised_port: int) -> None:
    """Formats `folder` at first use, then replaces this process with the broker's JVM."""
    java = _java()
    if java is None:
        raise ConfigError(str(_java_problem()))
    data, properties, logging = folder / "data", folder / "server.properties", folder / "log4j2.properties"
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    properties.write_text(
        _PROPERTIES.format(
            host=LOOPBACK, port=port, controller_port=controller_port, advertised_port=advertised_port, data=data
        ),
        "utf-8",
    )
    logging.write_text(_LOG4J, "utf-8")
    command = [
        java,
        f"-Xmx{_HEAP}",
        "-XX:+UseSerialGC",
        "-XX:TieredStopAtLevel=1",
        "-Djava.awt.headless=true",
        f"-Dlog4j2.configurationFile={logging}",
        "-cp",
        f"{home / 'libs'}/*",
    ]
    if not (data / "meta.properties").exists():
        _format(command, properties)
    os.execv(java, [*command, "kafka.Kafka", str(properties)])  # noqa: S606 - this process becomes the broker


def _format(command: list[str], properties: Path) -> None:
    cluster_id = base64.urlsafe_b64encode(uuid.uuid4().bytes).rstrip(b"=").decode()
    # An id that begins with a dash would be read as an option.
    arguments = ["kafka.tools.StorageTool", "format", f"--cluster-id={cluster_id}", "-c", str(properties)]
    done = subprocess.run(
        tied([*command, *arguments]),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_FORMAT_TIMEOUT_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        raise ConfigError(f"Kafka cannot format {properties.parent}: {(done.stdout.splitlines() or ['no output'])[-1]}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m devstack.kafka_local", description="a local Apache Kafka")
    parser.add_argument("home", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("port", type=int)
    parser.add_argument("controller_port", type=int)
    parser.add_argument("advertised_port", type=int)
    arguments = parser.parse_args()
    try:
        become_broker(**vars(arguments))
    except (ConfigError, OSError, subprocess.TimeoutExpired) as error:
        print(error, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
