"""Federated averaging of two clients, in one process, with and without 3LC: accuracy and bytes that clients return.

    pip install 'tersenet[flower]' && python examples/flower_two_clients.py

Each client has half of scikit-learn's digits. With Flower's own runtime (`flwr run`) only `TwoClients` is not needed.
"""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from tersenet.flower import Decoding, compressing

ROUNDS, CLIENTS = 10, (1, 2)


def digits():
    found = load_digits()
    return torch.from_numpy(found.data).float() / 16, torch.from_numpy(found.target).long()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def client(mods):
    app = ClientApp(mods=mods)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        net = network()
        net.load_state_dict(message.content["arrays"].to_torch_state_dict())
        images, labels = (part[:1500][context.node_id % 2 :: 2] for part in digits())
        optimizer = torch.optim.SGD(net.parameters(), 0.05)
        for at in torch.arange(len(images)).split(32):
            optimizer.zero_grad()
            cross_entropy(net(images[at]), labels[at]).backward()
            optimizer.step()
        metrics = MetricRecord({"num-examples": len(images)})
        return Message(RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}), reply_to=message)

    return app


class TwoClients(Grid):
    """The clients, called in turn in this process, each with a state of its own; counts the bytes they return."""

    def __init__(self, app):
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1  # as the runtime does
        self.app, self.returned = app, 0
        self.contexts = {node: Context(1, node, {}, RecordDict(), {}) for node in CLIENTS}

    def send_and_receive(self, messages, *, timeout=None):
        replies = []
        for message in messages:
            node = message.metadata.dst_node_id
            replies.append(self.app(message, self.contexts[node]))
            arrays = replies[-1].content["arrays"]
            self.returned += sum(array.numpy().nbytes for array in arrays.values())
        return replies

    def get_node_ids(self):
        return list(CLIENTS)

    def run(self):
        raise NotImplementedError

    def set_run(self, run):
        raise NotImplementedError

    def create_message(self, *given, **named):
        raise NotImplementedError

    def push_messages(self, messages):
        raise NotImplementedError

    def pull_messages(self, message_ids):
        raise NotImplementedError


class Averaging(Decoding, FedAvg):
    pass


def main():
    torch.set_num_threads(1)
    images, labels = (part[1500:] for part in digits())
    for name, strategy, mods in (("float32", FedAvg, []), ("3LC", Averaging, [compressing(1.5)])):
        grid = TwoClients(client(mods))
        averaging = strategy(fraction_evaluate=0)
        found = averaging.start(grid, ArrayRecord(network().state_dict()), ROUNDS)
        net = network()
        net.load_state_dict(found.arrays.to_torch_state_dict())
        right = (net(images).argmax(1) == labels).float().mean().item()
        print(f"{name}: accuracy {right:.4f} after {ROUNDS} rounds, {grid.returned:,} bytes returned")


if __name__ == "__main__":
    main()
