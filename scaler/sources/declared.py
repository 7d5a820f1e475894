"""Every kind of source that a user can declare, by its `type`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from scaler.sources.cron import CronDeclaration
from scaler.sources.engine_metrics import EngineDeclaration
from scaler.sources.prometheus import PrometheusDeclaration
from scaler.sources.push_declaration import PushDeclaration
from scaler.sources.redis_declaration import RedisDeclaration

Declared = Annotated[
    CronDeclaration | EngineDeclaration | PrometheusDeclaration | PushDeclaration | RedisDeclaration, Field(discriminator="type")
]
