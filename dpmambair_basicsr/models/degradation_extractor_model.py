from torch import Tensor

from dpmambair_basicsr.files.errors import OptionError
from dpmambair_basicsr.models.restoration_model import RestorationModel
from dpmambair_basicsr.registry import MODEL_REGISTRY


@MODEL_REGISTRY.register()
class DegradationExtractorModel(RestorationModel):
    """Stage 1 of DPMambaIR (Sec. 3.4): a DegradationAutoencoder turns the clean image into the degraded one.

    Losses, metrics and saved images therefore use the degraded image, `lq` of the dataset, as target. Options are
    RestorationModel's.
    """

    learns_degradations = True
    batch_names = (*RestorationModel.batch_names, 'clean')

    def feed_data(self, data: dict) -> None:
        if 'gt' not in data:
            current = self.monitor.current
            where = 'the batch' if current is None else f'dataset {current.name}'
            raise OptionError(f'{where} has no GT, from which {type(self).__name__} predicts the degraded image')
        super().feed_data(data)
        self.clean = self.gt
        self.gt = self.lq

    def network_inputs(self) -> tuple[Tensor, ...]:
        return self.clean, self.lq
