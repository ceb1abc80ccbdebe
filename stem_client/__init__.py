"""Client of a ranking service that serves a model exported by stem-tf.

    from stem_client import RankingClient

    client = RankingClient("ranker:8500")
    scores = client.rank(user={"user_id": 1042, "hour": 21}, items={"video_id": ids, "duration_ms": lengths})
    scores["long_view"]          # float32 [N]

`AsyncRankingClient` is the same for asyncio.

Needs numpy, grpcio and protobuf, and neither TensorFlow nor the rest of stem-tf.
"""

from stem_client.aio import AsyncRankingClient
from stem_client.client import RankingClient
from stem_client.errors import FeatureError, RankingError
from stem_client.metadata import Feature, ModelMetadata, Signature, Tensor
from stem_client.ranking import Top
from stem_client.retry import RetryPolicy
from stem_client.version import __version__

__all__ = [
    "AsyncRankingClient",
    "Feature",
    "FeatureError",
    "ModelMetadata",
    "RankingClient",
    "RankingError",
    "RetryPolicy",
    "Signature",
    "Tensor",
    "Top",
    "__version__",
]
