#include "eval_callback.h"

#include "llama-context.h"  // the scheduler and parameters of a context; this is the only file that includes it

namespace llama_moe {

void set_eval_callback(llama_context* context, ggml_backend_sched_eval_callback callback, void* data) {
    // The context gives its parameters to the scheduler whenever it builds a graph; a graph that is used again has what the last one
    // had. The parameters are not const, only the access to them.
    auto& params = const_cast<llama_cparams&>(context->get_cparams());
    params.cb_eval = callback;
    params.cb_eval_user_data = data;
    ggml_backend_sched_set_eval_callback(context->get_sched(), callback, data);
}

void reserve_compute_buffers(llama_context* context) {
    context->sched_reserve();
}

}  // namespace llama_moe
