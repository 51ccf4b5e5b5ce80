"""Real networks that train in bfloat16 on a processor, in about half the time; all else in them is float32."""

import torch
import torch.nn.functional as F
from table import real_data
from torch import nn

_, MODELS = real_data()


class FastLeNet5(MODELS.LeNet5):
    def forward(self, x):
        if not self.training:
            return super().forward(x)
        with torch.autocast("cpu", torch.bfloat16):
            x = F.max_pool2d(self.conv1(x), 2).contiguous(memory_format=torch.channels_last)
            x = F.max_pool2d(self.conv2(x), 2)
            return self.fc2(F.relu(self.fc1(x.flatten(1)))).float()


class FastResNet(MODELS.ResNet):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.training):
            return super().forward(x.contiguous(memory_format=torch.channels_last)).float()


FAST = {
    "lenet300": MODELS.LeNet300,
    "lenet5": FastLeNet5,
    "resnet20": lambda: FastResNet(20),
    "resnet56": lambda: FastResNet(56),
}


def load(name: str) -> nn.Module:
    """A trained network by name."""
    model = FAST[name]()
    model.load_state_dict(MODELS.load(name).state_dict())
    return model.eval()
