"""Run on every rank: trains and exports a list of configurations, one after the other.

python train_cases.py CASES.json, a list of {"config": tree, "export": directory, "port": number}
"""

import json
import os
import sys
from pathlib import Path

from shardes.config import parse_config
from shardes.export import export_model
from shardes.session import open_session
from shardes.tasks.loading import load_task
from shardes.trainer import Trainer


def main():
    for case in json.loads(Path(sys.argv[1]).read_text()):
        # Every case has a store of its own, on a port of its own.
        os.environ["MASTER_PORT"] = str(case["port"])
        with open_session(parse_config(case["config"], source="case")) as session:
            Trainer(session, load_task(session.config.task)).train()
            iteration, settings = session.config.es.iterations, session.config.determinants()
            export_model(session, Path(case["export"]), iteration=iteration, settings=settings)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # as shardes.cli.main does, and for the same reason
