"""The peer: the same XGBoost models behind Ray Serve's own `@serve.multiplexed`, as its documentation shows it.

    python loadtests/peers/ray_serve.py --models FOLDER --port 8000 --replicas 2 --models-max 1000

Prints `ready` when it serves, and stops when its standard input closes. A request is a POST of float32 rows with the
model's file name in the header `serve_multiplexed_model_id`; the answer is the predictions as float32.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import ray
import xgboost
from ray import serve
from starlette.requests import Request
from starlette.responses import Response


def build(folder: Path, *, features: int, replicas: int, models_max: int) -> serve.Application:
    """The application: as many replicas as the mesh has runtimes, room for all models in each."""

    @serve.deployment(
        num_replicas=replicas,
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 0},
        logging_config={"log_level": "ERROR"},
    )
    class Models:
        @serve.multiplexed(max_num_models_per_replica=models_max)  # type: ignore[untyped-decorator]
        async def get_model(self, name: str) -> xgboost.Booster:
            return xgboost.Booster(params={"nthread": 1}, model_file=str(folder / name))

        async def __call__(self, request: Request) -> Response:
            model = await self.get_model(serve.get_multiplexed_model_id())
            rows = np.frombuffer(await request.body(), np.float32).reshape(-1, features)
            return Response(model.inplace_predict(rows).astype(np.float32).tobytes())

    deployment: Any = Models  # The decorator returns a Deployment; its stubs say it returns the class.
    application: serve.Application = deployment.bind()
    return application


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--features", type=int, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--replicas", type=int, required=True)
    parser.add_argument("--models-max", type=int, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ray-serve-", dir="/tmp") as folder:
        ray.init(_temp_dir=folder, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        serve.start(
            http_options={"host": "127.0.0.1", "port": options.port}, logging_config={"enable_access_log": False}
        )
        app = build(options.models, features=options.features, replicas=options.replicas, models_max=options.models_max)
        serve.run(app, logging_config={"enable_access_log": False, "log_level": "ERROR"})
        print("ready", flush=True)
        sys.stdin.read()
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()


if __name__ == "__main__":
    main()
