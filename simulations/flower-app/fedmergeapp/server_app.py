"""The server side: one run of the experiment on Flower's grid, recorded as `fedmerge run` records it."""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedmerge.errors import ConfigError
from fedmerge.simulation.grids.numbered_grid import NumberedGrid
from fedmerge.simulation.runs.compare import run_on_grid
from fedmergeapp.experiment import experiment

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    out = Path(str(context.run_config["out"]))
    if not out.is_absolute():
        # The server's own folder is the daemon's, where nobody would look for a record.
        raise ConfigError(
            f"run-config out must be an absolute path, got {str(out)!r}: --run-config \"out='/some/folder'\""
        )
    configured = experiment(context.run_config)
    numbered = NumberedGrid(grid, configured.num_clients)
    method, resume = str(context.run_config["method"]), bool(context.run_config["resume"])
    print(run_on_grid(configured, method, numbered, out, print, resume=resume))
