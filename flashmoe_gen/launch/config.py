"""How a GPU kernel is launched: everything a launch says beside its arguments, made once per loaded kernel."""

from __future__ import annotations

from typing import Any

from ..errors import FlashMoEError

_DEFAULT_STREAM = 1  # CU_STREAM_LEGACY; 0 would be another stream where CUDA_PYTHON_CUDA_PER_THREAD_DEFAULT_STREAM is set


class LaunchConfig:
    """The configuration of ``cuLaunchKernelEx`` for one kernel, of which a launch changes the blocks and the stream.

    One launch at a time: a layer's calls wait for each other.

    Args:
        name: of the kernel, for errors.
        function: its ``CUfunction``.
        threads: of a block.
        shared_bytes: dynamic shared memory of a block.
        cluster: blocks of a cluster.
        cooperative: the driver starts all blocks or none.
        programmatic: a launch may begin while the kernel before it on the stream ends (programmatic stream serialization).
        priority: of its blocks; ``None``: that of the stream.
    """

    def __init__(
        self,
        name: str,
        function: int,
        threads: int,
        shared_bytes: int = 0,
        *,
        cluster: int = 1,
        cooperative: bool = False,
        programmatic: bool = False,
        priority: int | None = None,
    ) -> None:
        from cuda.bindings import driver

        self.name, self.cluster, self.cooperative = name, cluster, cooperative
        self._driver, self._function = driver, driver.CUfunction(function)
        self._config = config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = cluster, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = shared_bytes
        attributes = []
        if cluster > 1:
            attributes.append(self._attribute("CLUSTER_DIMENSION"))
            size = attributes[-1].value.clusterDim
            size.x, size.y, size.z = cluster, 1, 1
        if cooperative:
            attributes.append(self._attribute("COOPERATIVE"))
            attributes[-1].value.cooperative = 1
        if programmatic:
            attributes.append(self._attribute("PROGRAMMATIC_STREAM_SERIALIZATION"))
            attributes[-1].value.programmaticStreamSerializationAllowed = 1
        if priority is not None:
            attributes.append(self._attribute("PRIORITY"))
            attributes[-1].value.priority = priority
        config.attrs, config.numAttrs = attributes, len(attributes)
        self._blocks, self._stream = cluster, -1  # of the last launch
        self._launch, self._success = driver.cuLaunchKernelEx, driver.CUresult.CUDA_SUCCESS

    def _attribute(self, name: str) -> Any:
        attribute = self._driver.CUlaunchAttribute()
        attribute.id = getattr(self._driver.CUlaunchAttributeID, f"CU_LAUNCH_ATTRIBUTE_{name}")
        return attribute

    def launch(self, parameters: int, blocks: int, stream: int) -> None:
        """Launch with the arguments whose addresses are at ``parameters``; the driver copies them before this returns.

        Raises:
            FlashMoEError: the driver refused.
        """
        if blocks != self._blocks:
            self._config.gridDimX = self._blocks = blocks
        if stream != self._stream:
            self._config.hStream = self._driver.CUstream(stream or _DEFAULT_STREAM)
            self._stream = stream
        (status,) = self._launch(self._config, self._function, parameters, 0)
        if status != self._success:
            raise FlashMoEError(f"{self.name} cannot be launched with {blocks} blocks: {status.name}.")

    def active_clusters(self) -> int:
        """Clusters that the current GPU runs at the same time.

        Raises:
            FlashMoEError: the driver does not say.
        """
        status, clusters = self._driver.cuOccupancyMaxActiveClusters(self._function, self._config)
        if status != self._success:
            raise FlashMoEError(f"The clusters of {self.name} that fit the GPU cannot be counted: {status.name}.")
        return int(clusters)
