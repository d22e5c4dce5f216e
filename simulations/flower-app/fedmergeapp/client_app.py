"""The client side: hands every message to the experiment's own ClientApp."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedmergeapp.experiment import experiment_client_app

app = ClientApp()


@app.train()
@app.evaluate()
@app.query()
@app.query("statistics")
@app.query("questions")
@app.query("partition")
def answer(message: Message, context: Context) -> Message:
    return experiment_client_app(context.run_config)(message, context)
