//! Plays TensorRT for one plugin: `plugin_driver LIBRARY LOGGER < commands`, one command and its answer per line.
//! LOGGER is a library of fake_logger.cpp.
//!
//!   creators | abi | table
//!   create OP [NAME=int:1 | NAME=float:0.5 | NAME=text:a]...     clone | attach | reload (serialised and made again)
//!   device                  opens libcuda and takes its first device; tensors then have memory
//!   context N | reset       of the fake libcuda
//!   input NAME TYPE 1x2x3 [FILE] | output NAME TYPE 1x2x3 [INPUT whose memory it shares] | clear
//!   aliases | timing | types | workspace | configure | format POSITION TYPE [chw32]
//!   shape | shape N (in N threads, on clones) | enqueue | save NAME FILE
#include "edgeattn/plugins.h"

#include <NvInferRuntime.h>
#include <cuda.h>

#include <atomic>
#include <deque>
#include <dlfcn.h>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

using namespace nvinfer1;

namespace
{

//! CU_STREAM_PER_THREAD: another one than the stream that a forgotten argument means.
auto* const kSTREAM = reinterpret_cast<cudaStream_t>(2);

template <typename Function>
Function* symbol(void* library, char const* name)
{
    auto* const function = reinterpret_cast<Function*>(dlsym(library, name));
    if (function == nullptr)
    {
        throw std::runtime_error(std::string("no function ") + name);
    }
    return function;
}

void* opened(char const* path)
{
    void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr)
    {
        throw std::runtime_error(dlerror());
    }
    return library;
}

void require(CUresult result, char const* function)
{
    if (result != CUDA_SUCCESS)
    {
        throw std::runtime_error(function + (" gave " + std::to_string(result)));
    }
}

//! Memory on a device, of libcuda or of the fake one.
class Device
{
public:
    void open()
    {
        mLibrary = opened("libcuda.so.1");
        CUdevice device = 0;
        CUcontext context = nullptr;
        require(symbol<decltype(cuInit)>(mLibrary, "cuInit")(0), "cuInit");
        require(symbol<decltype(cuDeviceGet)>(mLibrary, "cuDeviceGet")(&device, 0), "cuDeviceGet");
        require(symbol<CUresult(CUcontext*, CUdevice)>(mLibrary, "cuDevicePrimaryCtxRetain")(&context, device),
            "cuDevicePrimaryCtxRetain");
        setContext(context);
    }

    void setContext(CUcontext context)
    {
        require(symbol<CUresult(CUcontext)>(mLibrary, "cuCtxSetCurrent")(context), "cuCtxSetCurrent");
    }

    void reset()
    {
        require(symbol<CUresult(CUdevice)>(mLibrary, "cuDevicePrimaryCtxReset_v2")(0), "cuDevicePrimaryCtxReset");
    }

    void* allocate(size_t size)
    {
        CUdeviceptr address = 0;
        if (mLibrary != nullptr && size > 0)
        {
            require(symbol<CUresult(CUdeviceptr*, size_t)>(mLibrary, "cuMemAlloc_v2")(&address, size), "cuMemAlloc");
        }
        return reinterpret_cast<void*>(address);
    }

    void write(void* to, std::string const& bytes)
    {
        require(symbol<CUresult(CUdeviceptr, void const*, size_t)>(mLibrary, "cuMemcpyHtoD_v2")(
                    reinterpret_cast<CUdeviceptr>(to), bytes.data(), bytes.size()),
            "cuMemcpyHtoD");
    }

    std::string read(void const* from, size_t size)
    {
        std::string bytes(size, '\0');
        require(symbol<CUresult()>(mLibrary, "cuCtxSynchronize")(), "cuCtxSynchronize");
        require(symbol<CUresult(void*, CUdeviceptr, size_t)>(mLibrary, "cuMemcpyDtoH_v2")(
                    bytes.data(), reinterpret_cast<CUdeviceptr>(from), size),
            "cuMemcpyDtoH");
        return bytes;
    }

private:
    void* mLibrary{nullptr};
};

struct TypeName
{
    char const* name;
    DataType type;
    size_t bytes;
};

constexpr TypeName kTYPES[] = {{"fp32", DataType::kFLOAT, 4}, {"fp16", DataType::kHALF, 2},
    {"bf16", DataType::kBF16, 2}, {"int32", DataType::kINT32, 4}, {"int8", DataType::kINT8, 1}};

TypeName const& typeNamed(std::string const& name)
{
    for (auto const& type : kTYPES)
    {
        if (name == type.name)
        {
            return type;
        }
    }
    throw std::runtime_error("no type " + name);
}

std::string nameOf(DataType wanted)
{
    for (auto const& type : kTYPES)
    {
        if (type.type == wanted)
        {
            return type.name;
        }
    }
    return "?";
}

struct Tensor
{
    std::string name;
    PluginTensorDesc desc;
    size_t bytes;
    void* address;
};

std::string readFile(std::string const& path)
{
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

class Driver
{
public:
    Driver(char const* library, char const* logger)
        : mLibrary(opened(library))
    {
        void* const finder = symbol<void*() noexcept>(opened(logger), "fakeFinder")();
        symbol<void(ILoggerFinder*)>(mLibrary, "setLoggerFinder")(static_cast<ILoggerFinder*>(finder));
        int32_t count = 0;
        auto* const creators = symbol<IPluginCreatorInterface* const*(int32_t&)>(mLibrary, "getCreators")(count);
        for (int32_t i = 0; i < count; ++i)
        {
            mCreators.push_back(static_cast<IPluginCreatorV3One*>(creators[i]));
        }
    }

    void obey(std::string const& line)
    {
        std::istringstream words(line);
        std::string command;
        words >> command;
        std::vector<std::string> const rest{std::istream_iterator<std::string>(words), {}};
        if (command == "create" || command == "clone" || command == "attach" || command == "reload")
        {
            make(command, rest);
        }
        else if (command == "input" || command == "output" || command == "clear")
        {
            describe(command, rest);
        }
        else if (command == "creators" || command == "abi" || command == "table")
        {
            tell(command);
        }
        else if (command == "device" || command == "context" || command == "reset" || command == "save")
        {
            handle(command, rest);
        }
        else if (command == "shape" || command == "enqueue")
        {
            execute(command, rest);
        }
        else
        {
            ask(command, rest);
        }
    }

private:
    void tell(std::string const& command)
    {
        if (command == "abi")
        {
            std::cout << "abi " << symbol<int32_t()>(mLibrary, "edgeattnAbiVersion")() << std::endl;
        }
        if (command == "table")
        {
            std::cout << "table " << symbol<char const*()>(mLibrary, "edgeattnVariantTable")() << std::endl;
        }
        for (auto* const creator : command == "creators" ? mCreators : std::vector<IPluginCreatorV3One*>{})
        {
            std::cout << "creator " << creator->getPluginName() << " " << creator->getPluginVersion() << " "
                      << creator->getPluginNamespace();
            auto const& fields = *creator->getFieldNames();
            for (int32_t i = 0; i < fields.nbFields; ++i)
            {
                std::cout << " " << fields.fields[i].name << ":" << static_cast<int32_t>(fields.fields[i].type);
            }
            std::cout << std::endl;
        }
    }

    void make(std::string const& command, std::vector<std::string> const& rest)
    {
        std::unique_ptr<IPluginV3> made;
        if (command == "create")
        {
            made.reset(create(rest));
        }
        else if (command == "reload")
        {
            made.reset(creatorNamed(core().getPluginName())
                    .createPlugin("layer", runtime().getFieldsToSerialize(), TensorRTPhase::kRUNTIME));
        }
        else
        {
            made.reset(command == "clone" ? mPlugin->clone() : runtime().attachToContext(nullptr));
        }
        std::cout << command << (made == nullptr ? " failed" : " ok") << std::endl;
        if (made != nullptr)
        {
            mPlugin = std::move(made);
        }
    }

    IPluginV3* create(std::vector<std::string> const& rest)
    {
        std::deque<std::string> texts;
        std::deque<int32_t> integers;
        std::deque<float> numbers;
        std::vector<PluginField> fields;
        for (size_t i = 1; i < rest.size(); ++i)
        {
            auto const equals = rest[i].find('=');
            auto const colon = rest[i].find(':');
            auto const kind = rest[i].substr(equals + 1, colon - equals - 1);
            auto const value = rest[i].substr(colon + 1);
            auto const& name = texts.emplace_back(rest[i].substr(0, equals));
            if (kind == "int")
            {
                fields.emplace_back(name.c_str(), &integers.emplace_back(std::stoi(value)), PluginFieldType::kINT32, 1);
            }
            else if (kind == "float")
            {
                fields.emplace_back(
                    name.c_str(), &numbers.emplace_back(std::stof(value)), PluginFieldType::kFLOAT32, 1);
            }
            else
            {
                auto const& text = texts.emplace_back(value);
                fields.emplace_back(
                    name.c_str(), text.data(), PluginFieldType::kCHAR, static_cast<int32_t>(text.size()));
            }
        }
        PluginFieldCollection const collection{static_cast<int32_t>(fields.size()), fields.data()};
        return creatorNamed(rest.at(0)).createPlugin("layer", &collection, TensorRTPhase::kBUILD);
    }

    IPluginCreatorV3One& creatorNamed(std::string const& name)
    {
        for (auto* const creator : mCreators)
        {
            if (name == creator->getPluginName())
            {
                return *creator;
            }
        }
        throw std::runtime_error("no creator " + name);
    }

    void describe(std::string const& command, std::vector<std::string> const& rest)
    {
        if (command == "clear")
        {
            mInputs.clear();
            mOutputs.clear();
            return;
        }
        TypeName const& type = typeNamed(rest.at(1));
        Tensor tensor{rest.at(0), {{}, type.type, TensorFormat::kLINEAR, 1.0F}, type.bytes, nullptr};
        std::istringstream sizes(rest.at(2));
        for (std::string size; std::getline(sizes, size, 'x');)
        {
            tensor.desc.dims.d[tensor.desc.dims.nbDims++] = std::stoll(size);
            tensor.bytes *= static_cast<size_t>(std::stoll(size));
        }
        if (command == "output" && rest.size() > 3)
        {
            tensor.address = tensorNamed(rest[3]).address;
        }
        else
        {
            tensor.address = mDevice.allocate(tensor.bytes);
        }
        if (command == "input" && rest.size() > 3)
        {
            mDevice.write(tensor.address, readFile(rest[3]));
        }
        std::cout << "tensor " << tensor.name << " " << tensor.address << std::endl;
        (command == "input" ? mInputs : mOutputs).push_back(tensor);
    }

    Tensor const& tensorNamed(std::string const& name) const
    {
        for (auto const* const tensors : {&mInputs, &mOutputs})
        {
            for (auto const& tensor : *tensors)
            {
                if (tensor.name == name)
                {
                    return tensor;
                }
            }
        }
        throw std::runtime_error("no tensor " + name);
    }

    void handle(std::string const& command, std::vector<std::string> const& rest)
    {
        if (command == "device")
        {
            mDevice.open();
        }
        else if (command == "context")
        {
            mDevice.setContext(reinterpret_cast<CUcontext>(std::stoull(rest.at(0))));
        }
        else if (command == "reset")
        {
            mDevice.reset();
        }
        else
        {
            Tensor const& tensor = tensorNamed(rest.at(0));
            std::ofstream(rest.at(1), std::ios::binary) << mDevice.read(tensor.address, tensor.bytes);
        }
        std::cout << command << " ok" << std::endl;
    }

    void ask(std::string const& command, std::vector<std::string> const& rest)
    {
        auto const inputs = dynamicDescs(mInputs);
        auto const outputs = dynamicDescs(mOutputs);
        std::ostringstream answer;
        if (command == "aliases")
        {
            for (int32_t i = 0; i < build().getNbOutputs(); ++i)
            {
                answer << build().getAliasedInput(i) << " ";
            }
        }
        else if (command == "timing")
        {
            answer << build().getTimingCacheID();
        }
        else if (command == "types")
        {
            std::vector<DataType> given;
            for (auto const& tensor : mInputs)
            {
                given.push_back(tensor.desc.type);
            }
            std::vector<DataType> types(static_cast<size_t>(build().getNbOutputs()), DataType::kBOOL);
            answer << build().getOutputDataTypes(types.data(), build().getNbOutputs(), given.data(), countOf(given));
            for (auto const type : types)
            {
                answer << " " << nameOf(type);
            }
        }
        else if (command == "workspace")
        {
            answer << workspaceSize();
        }
        else if (command == "configure")
        {
            answer << build().configurePlugin(inputs.data(), countOf(inputs), outputs.data(), countOf(outputs));
        }
        else if (command == "format")
        {
            auto tensors = inputs;
            tensors.insert(tensors.end(), outputs.begin(), outputs.end());
            int32_t const position = std::stoi(rest.at(0));
            tensors.at(static_cast<size_t>(position)).desc.type = typeNamed(rest.at(1)).type;
            if (rest.size() > 2)
            {
                tensors[static_cast<size_t>(position)].desc.format = TensorFormat::kCHW32;
            }
            answer << build().supportsFormatCombination(position, tensors.data(), countOf(inputs), countOf(outputs));
        }
        else
        {
            throw std::runtime_error("no command " + command);
        }
        std::cout << command << " " << answer.str() << std::endl;
    }

    void execute(std::string const& command, std::vector<std::string> const& rest)
    {
        if (command == "enqueue")
        {
            int32_t const code = enqueue();
            std::cout << "enqueue " << code << std::endl;
        }
        else if (rest.empty())
        {
            int32_t const code = changeShape(*mPlugin);
            std::cout << "shape " << code << std::endl;
        }
        else
        {
            int32_t const failures = changeShapeInThreads(std::stoul(rest[0]));
            std::cout << "shape " << failures << std::endl;
        }
    }

    int32_t changeShape(IPluginV3& plugin) const
    {
        auto const inputs = descs(mInputs);
        auto const outputs = descs(mOutputs);
        return runtimeOf(plugin).onShapeChange(inputs.data(), countOf(inputs), outputs.data(), countOf(outputs));
    }

    int32_t changeShapeInThreads(size_t count)
    {
        std::vector<std::unique_ptr<IPluginV3>> clones;
        std::vector<std::thread> threads;
        std::atomic<int32_t> failures{0};
        for (size_t i = 0; i < count; ++i)
        {
            clones.emplace_back(runtime().attachToContext(nullptr));
            threads.emplace_back([this, plugin = clones.back().get(), &failures] { failures += changeShape(*plugin); });
        }
        for (auto& thread : threads)
        {
            thread.join();
        }
        return failures;
    }

    int32_t enqueue()
    {
        std::vector<void const*> inputs;
        std::vector<void*> outputs;
        for (auto const& tensor : mInputs)
        {
            inputs.push_back(tensor.address);
        }
        for (auto const& tensor : mOutputs)
        {
            outputs.push_back(tensor.address);
        }
        void* const workspace = mDevice.allocate(workspaceSize());
        std::cout << "tensor workspace " << workspace << std::endl;
        auto const inputDescs = descs(mInputs);
        auto const outputDescs = descs(mOutputs);
        return runtime().enqueue(
            inputDescs.data(), outputDescs.data(), inputs.data(), outputs.data(), workspace, kSTREAM);
    }

    size_t workspaceSize()
    {
        auto const inputs = dynamicDescs(mInputs);
        auto const outputs = dynamicDescs(mOutputs);
        return build().getWorkspaceSize(inputs.data(), countOf(inputs), outputs.data(), countOf(outputs));
    }

    static std::vector<PluginTensorDesc> descs(std::vector<Tensor> const& tensors)
    {
        std::vector<PluginTensorDesc> found;
        for (auto const& tensor : tensors)
        {
            found.push_back(tensor.desc);
        }
        return found;
    }

    static std::vector<DynamicPluginTensorDesc> dynamicDescs(std::vector<Tensor> const& tensors)
    {
        std::vector<DynamicPluginTensorDesc> found;
        for (auto const& tensor : tensors)
        {
            found.push_back({tensor.desc, tensor.desc.dims, tensor.desc.dims, tensor.desc.dims});
        }
        return found;
    }

    template <typename T>
    static int32_t countOf(std::vector<T> const& items)
    {
        return static_cast<int32_t>(items.size());
    }

    template <typename Capability>
    static Capability& capability(IPluginV3& plugin, PluginCapabilityType type)
    {
        return *static_cast<Capability*>(plugin.getCapabilityInterface(type));
    }

    IPluginV3OneCore& core()
    {
        return capability<IPluginV3OneCore>(*mPlugin, PluginCapabilityType::kCORE);
    }

    IPluginV3OneBuildV2& build()
    {
        // As TensorRT does: the capability is what its version says.
        auto& found = capability<IPluginV3OneBuild>(*mPlugin, PluginCapabilityType::kBUILD);
        if (found.getInterfaceInfo().major != 2)
        {
            throw std::runtime_error("the plugin has no IPluginV3OneBuildV2");
        }
        return static_cast<IPluginV3OneBuildV2&>(found);
    }

    static IPluginV3OneRuntime& runtimeOf(IPluginV3& plugin)
    {
        return capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
    }

    IPluginV3OneRuntime& runtime()
    {
        return runtimeOf(*mPlugin);
    }

    void* mLibrary;
    Device mDevice;
    std::vector<IPluginCreatorV3One*> mCreators;
    std::unique_ptr<IPluginV3> mPlugin;
    std::vector<Tensor> mInputs;
    std::vector<Tensor> mOutputs;
};

} // namespace

int main(int argc, char** argv)
{
    try
    {
        Driver driver(argc > 1 ? argv[1] : "", argc > 2 ? argv[2] : "");
        for (std::string line; std::getline(std::cin, line);)
        {
            driver.obey(line);
        }
    }
    catch (std::exception const& error)
    {
        std::cout << "error " << error.what() << std::endl;
        return 1;
    }
    return 0;
}
