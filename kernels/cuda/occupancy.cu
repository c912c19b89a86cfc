// Asked how many clusters of such blocks a GPU runs at once, the driver tells how its SMs are grouped.
extern "C" __global__ void empty() {}
