// A libnvinfer for machines without a GPU, with the vtables of the headers it is built with. engine_server.py runs the
// engines, on the memory and the stream of fake_cuda.c. The environment says
//   FAKE_NVINFER_PYTHON and FAKE_NVINFER_SERVER: how to start it,
//   FAKE_NVINFER_VERSION: what getInferLibVersion returns,
//   FAKE_NVINFER_FAIL=FUNCTION or FUNCTION:N: what fails, always or in the one call after N,
//   FAKE_NVINFER_LOG: a file to which every function that is entered is added.
// Misuse is an error, as it would be on a GPU: shapes outside the profile, an address that is missing, a stream that is
// null, a growing cache written over itself.
#include "stubs.h"

#include <NvInferVersion.h>
#include <cstring>
#include <dlfcn.h>
#include <fstream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <sys/wait.h>
#include <unistd.h>
#include <utility>
#include <vector>

namespace
{

using namespace nvinfer1;
using Json = nlohmann::json;
using Bytes = std::vector<char>;

std::string setting(char const* name, char const* otherwise = "")
{
    char const* const text = std::getenv(name);
    return text ? text : otherwise;
}

//! Notes that a function was entered; whether it is to fail.
bool fails(std::string const& function)
{
    if (std::string const log = setting("FAKE_NVINFER_LOG"); !log.empty())
    {
        std::ofstream(log, std::ios::app) << function << '\n';
    }
    static std::map<std::string, int> calls;
    std::string const fail = setting("FAKE_NVINFER_FAIL");
    size_t const colon = fail.find(':');
    if (fail.substr(0, colon) != function)
    {
        return false;
    }
    return colon == std::string::npos || calls[function]++ == std::stoi(fail.substr(colon + 1));
}

//! The process that runs an engine.
class Server
{
public:
    Server()
    {
        int to[2], from[2];
        if (pipe(to) || pipe(from))
        {
            std::abort();
        }
        mChild = fork();
        if (mChild == 0)
        {
            dup2(to[0], 0);
            dup2(from[1], 1);
            for (int end : {to[0], to[1], from[0], from[1]})
            {
                close(end);
            }
            std::string const python = setting("FAKE_NVINFER_PYTHON"), script = setting("FAKE_NVINFER_SERVER");
            execl(python.c_str(), python.c_str(), script.c_str(), static_cast<char*>(nullptr));
            _exit(127);
        }
        close(to[0]);
        close(from[1]);
        mTo = fdopen(to[1], "wb");
        mFrom = fdopen(from[0], "rb");
    }

    ~Server()
    {
        std::fclose(mTo);
        std::fclose(mFrom);
        waitpid(mChild, nullptr, 0);
    }

    std::pair<Json, Bytes> ask(Json asked, Bytes const& raw = {})
    {
        asked["bytes"] = raw.size();
        std::string const line = asked.dump() + "\n";
        std::fwrite(line.data(), 1, line.size(), mTo);
        std::fwrite(raw.data(), 1, raw.size(), mTo);
        std::fflush(mTo);
        std::string answer;
        for (int c = std::fgetc(mFrom); c != '\n'; c = std::fgetc(mFrom))
        {
            if (c == EOF)
            {
                missing("the server's answer");
            }
            answer.push_back(static_cast<char>(c));
        }
        Json const found = Json::parse(answer);
        Bytes content(found.at("bytes").get<size_t>());
        if (std::fread(content.data(), 1, content.size(), mFrom) != content.size())
        {
            missing("the server's bytes");
        }
        return {found, content};
    }

private:
    pid_t mChild = 0;
    FILE* mTo = nullptr;
    FILE* mFrom = nullptr;
};

Dims to_dims(Json const& shape)
{
    Dims dims{static_cast<int32_t>(shape.size()), {}};
    for (size_t i = 0; i < shape.size(); ++i)
    {
        dims.d[i] = shape[i];
    }
    return dims;
}

DataType to_type(std::string const& name)
{
    static std::map<std::string, DataType> const types{{"FLOAT", DataType::kFLOAT}, {"HALF", DataType::kHALF},
        {"BF16", DataType::kBF16}, {"INT8", DataType::kINT8}, {"INT32", DataType::kINT32},
        {"INT64", DataType::kINT64}, {"BOOL", DataType::kBOOL}};
    return types.at(name);
}

size_t width(std::string const& dtype)
{
    return dtype == "INT64" ? 8 : dtype == "FLOAT" || dtype == "INT32" ? 4 : dtype == "HALF" || dtype == "BF16" ? 2 : 1;
}

size_t bytes_of(Json const& tensor, Json const& shape)
{
    size_t bytes = width(tensor.at("dtype"));
    for (Json const& size : shape)
    {
        bytes *= size.get<size_t>();
    }
    return bytes;
}

//! What engine and contexts share.
struct Facts
{
    Server server;
    ILogger* logger;
    Json tensors;
    Json profiles;

    bool log(std::string const& message) const
    {
        logger->log(ILogger::Severity::kERROR, message.c_str());
        return false;
    }

    Json const& tensor(std::string const& name) const
    {
        for (Json const& tensor : tensors)
        {
            if (tensor.at("name") == name)
            {
                return tensor;
            }
        }
        missing(name.c_str());
    }
};

//! One run: what a kernel launch would hold.
struct Job
{
    Facts* facts;
    int32_t profile;
    Json shapes;
    std::map<std::string, char*> addresses;
    Json outputs;

    static void run(void* argument)
    {
        Job const& job = *static_cast<Job*>(argument);
        Bytes given;
        for (Json const& tensor : job.facts->tensors)
        {
            std::string const name = tensor.at("name");
            if (tensor.at("input"))
            {
                char const* const from = job.addresses.at(name);
                given.insert(given.end(), from, from + bytes_of(tensor, job.shapes.at(name)));
            }
        }
        auto const [answer, found]
            = job.facts->server.ask({{"do", "run"}, {"profile", job.profile}, {"shapes", job.shapes}}, given);
        if (!answer.at("ok"))
        {
            job.facts->log(answer.at("error"));
            return;
        }
        char const* from = found.data();
        for (Json const& tensor : job.facts->tensors)
        {
            std::string const name = tensor.at("name");
            if (!tensor.at("input"))
            {
                size_t const bytes = bytes_of(tensor, job.outputs.at(name));
                std::memcpy(job.addresses.at(name), from, bytes);
                from += bytes;
            }
        }
    }

    static void release(void* argument)
    {
        delete static_cast<Job*>(argument);
    }
};

class FakeContext final : public StubExecutionContext
{
public:
    explicit FakeContext(Facts& facts)
        : mFacts(facts)
    {
    }

    bool setOptimizationProfileAsync(int32_t profile, cudaStream_t stream) noexcept override
    {
        bool const known = profile >= 0 && static_cast<size_t>(profile) < mFacts.profiles.size();
        if (fails("set_profile") || !stream || !known)
        {
            return mFacts.log("setOptimizationProfileAsync: Error Code 3");
        }
        mProfile = profile;
        mShapes.clear();
        return true;
    }

    bool setInputShape(char const* name, Dims const& dims) noexcept override
    {
        Json shape = Json::array();
        Json const& range = mFacts.profiles.at(static_cast<size_t>(mProfile)).at(name);
        bool fits = dims.nbDims == static_cast<int32_t>(range[0].size());
        for (int32_t i = 0; fits && i < dims.nbDims; ++i)
        {
            size_t const at = static_cast<size_t>(i);
            shape.push_back(dims.d[i]);
            fits = range[0][at].get<int64_t>() <= dims.d[i] && dims.d[i] <= range[2][at].get<int64_t>();
        }
        if (fails("set_input_shape") || !fits)
        {
            return mFacts.log(std::string("setInputShape: ") + name + " " + shape.dump());
        }
        mShapes[name] = shape;
        return true;
    }

    Dims getTensorShape(char const* name) const noexcept override
    {
        return to_dims(outputs().at(name));
    }

    bool setTensorAddress(char const* name, void* data) noexcept override
    {
        if (fails("set_tensor_address") || !data || reinterpret_cast<uintptr_t>(data) % 256)
        {
            return mFacts.log(std::string("setTensorAddress: ") + name);
        }
        mAddresses[name] = static_cast<char*>(data);
        return true;
    }

    bool enqueueV3(cudaStream_t stream) noexcept override
    {
        if (fails("enqueue") || !stream)
        {
            return mFacts.log("IExecutionContext::enqueueV3: Error Code 1");
        }
        auto job = std::make_unique<Job>(Job{&mFacts, mProfile, mShapes, mAddresses, outputs()});
        for (Json const& tensor : mFacts.tensors)
        {
            if (!mAddresses.count(tensor.at("name")))
            {
                return mFacts.log("enqueueV3: no address of " + tensor.at("name").get<std::string>());
            }
        }
        for (auto const& [output, shape] : job->outputs.items())
        {
            for (auto const& [input, given] : mShapes.items())
            {
                if (mAddresses[output] == mAddresses[input] && shape != given)
                {
                    return mFacts.log("enqueueV3: " + output + " is written over " + input);
                }
            }
        }
        using Enqueue = void(void (*run)(void*), void (*release)(void*), void* argument);
        void* const cuda = dlopen("libcuda.so.1", RTLD_NOW);
        reinterpret_cast<Enqueue*>(dlsym(cuda, "fakeCudaEnqueue"))(Job::run, Job::release, job.release());
        dlclose(cuda);
        return true;
    }

private:
    Json outputs() const
    {
        Json const asked{{"do", "shapes"}, {"profile", mProfile}, {"shapes", mShapes}};
        Json const answer = mFacts.server.ask(asked).first;
        return answer.at("ok").get<bool>() ? answer.at("shapes") : (missing("shapes that fit"), Json());
    }

    Facts& mFacts;
    int32_t mProfile = 0;
    Json mShapes = Json::object();
    std::map<std::string, char*> mAddresses;
};

class Context final : public IExecutionContext
{
public:
    explicit Context(Facts& facts)
        : mFake(facts)
    {
        mImpl = &mFake;
    }

private:
    FakeContext mFake;
};

class FakeEngine final : public StubCudaEngine
{
public:
    Facts facts;

    IExecutionContext* createExecutionContext(ExecutionContextAllocationStrategy) noexcept override
    {
        if (fails("create_context"))
        {
            facts.log("createExecutionContext: Error Code 2: OutOfMemory");
            return nullptr;
        }
        return new Context(facts);
    }

    int32_t getNbOptimizationProfiles() const noexcept override
    {
        return static_cast<int32_t>(facts.profiles.size());
    }

    int32_t getNbIOTensors() const noexcept override
    {
        return static_cast<int32_t>(facts.tensors.size());
    }

    char const* getIOTensorName(int32_t index) const noexcept override
    {
        return facts.tensors.at(static_cast<size_t>(index)).at("name").get_ref<std::string const&>().c_str();
    }

    TensorIOMode getTensorIOMode(char const* name) const noexcept override
    {
        return facts.tensor(name).at("input").get<bool>() ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT;
    }

    DataType getTensorDataType(char const* name) const noexcept override
    {
        return to_type(facts.tensor(name).at("dtype"));
    }

    Dims getTensorShape(char const* name) const noexcept override
    {
        return to_dims(facts.tensor(name).at("shape"));
    }

    Dims getProfileShape(char const* name, int32_t profile, OptProfileSelector select) const noexcept override
    {
        return to_dims(facts.profiles.at(static_cast<size_t>(profile)).at(name).at(static_cast<size_t>(select)));
    }
};

class Engine final : public ICudaEngine
{
public:
    Engine()
    {
        mImpl = &fake;
    }

    FakeEngine fake;
};

class Registry final : public StubPluginRegistry
{
public:
    PluginLibraryHandle loadLibrary(AsciiChar const* path) noexcept override
    {
        (void)fails(std::string("load_library ") + path);
        return this;
    }
};

class FakeRuntime final : public StubRuntime
{
public:
    explicit FakeRuntime(ILogger& logger)
        : mLogger(logger)
    {
    }

    ICudaEngine* deserializeCudaEngine(void const* blob, std::size_t size) noexcept override
    {
        auto engine = std::make_unique<Engine>();
        Facts& facts = engine->fake.facts;
        facts.logger = &mLogger;
        char const* const from = static_cast<char const*>(blob);
        Json const answer = facts.server.ask({{"do", "open"}}, {from, from + size}).first;
        if (fails("deserialize") || !answer.at("ok"))
        {
            facts.log("IRuntime::deserializeCudaEngine: Error Code 1");
            return nullptr;
        }
        facts.tensors = answer.at("tensors");
        facts.profiles = answer.at("profiles");
        return engine.release();
    }

    IPluginRegistry& getPluginRegistry() noexcept override
    {
        return mRegistry;
    }

private:
    ILogger& mLogger;
    Registry mRegistry;
};

class Runtime final : public IRuntime
{
public:
    explicit Runtime(ILogger& logger)
        : mFake(logger)
    {
        mImpl = &mFake;
    }

private:
    FakeRuntime mFake;
};

} // namespace

extern "C" int32_t getInferLibVersion() noexcept
{
    (void)fails("getInferLibVersion");
    return std::stoi(setting("FAKE_NVINFER_VERSION"));
}

extern "C" void* createInferRuntime_INTERNAL(void* logger, int32_t version) noexcept
{
    bool const failed = fails("create_runtime") || version != std::stoi(setting("FAKE_NVINFER_VERSION"));
    return failed ? nullptr : new Runtime(*static_cast<ILogger*>(logger));
}
