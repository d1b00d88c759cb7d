-- The front door's route table: which server slots hold a model, or the model that a vmodel leads to. One table for all threads (`lua-load`), a cache that
-- the gateway fills over the admin socket and may lose at any time: a miss goes to the gateway.

local SLOTS_BACKEND = "runtimes"

-- By "tenant/id", for a vmodel "tenant/@id": a server name, or for several copies or a vmodel {names, turn = n, model}.
local routes = {}
local count = 0
-- Names of servers that health checks or errors took down. Kept by events: asking per request would cost more.
local down = {}

-- Copies take turns; the next in turn stands back when the one after it has fewer requests in flight, so a slow copy
-- gets less. A copy known to be down is passed over. If all are down, any will do: HAProxy then takes the gateway.
local function choose(copies)
  local names, servers = copies.names, core.backends[SLOTS_BACKEND].servers
  local n = #names
  local turn = copies.turn % n + 1
  copies.turn = turn
  local first
  for step = 0, n - 1 do
    local name = names[(turn + step - 1) % n + 1]
    if not down[name] then
      if not first then
        first = name
      else
        return servers[name]:get_cur_sess() < servers[first]:get_cur_sess() and name or first
      end
    end
  end
  return first or names[turn]
end

-- The server for a key; for a vmodel "server:tenant/model", in one answer, so that a flip never mixes the two.
core.register_converters("route", function(key)
  local found = routes[key]
  if type(found) == "table" then
    local name = #found.names == 1 and found.names[1] or choose(found)
    return found.model and name .. ":" .. found.model or name
  end
  return found
end)

-- The model name of a ModelInferRequest: protobuf field 1, a string, which every serializer writes first. Gets the
-- message's first bytes up to the first NUL; nil (a miss) for anything odd.
core.register_converters("grpc_model", function(message)
  if message:byte(1) ~= 0x0A then return nil end
  local size, from = message:byte(2), 3
  if not size then return nil end
  if size >= 128 then -- a two-byte varint; ids are at most 128 bytes long
    local high = message:byte(3)
    if not high or high >= 128 then return nil end
    size, from = size - 128 + high * 128, 4
  end
  if size == 0 or #message < from + size - 1 then return nil end
  return message:sub(from, from + size - 1)
end)

core.event_sub({"SERVER_UP", "SERVER_DOWN"}, function(event, server)
  if server.proxy_name == SLOTS_BACKEND then
    down[server.name] = event == "SERVER_DOWN" or nil
  end
end)

local function cli(verb, usage, action)
  core.register_cli({"route", verb}, usage, function(applet, _, _, ...)
    local answer = action(...)
    if answer then applet:send(answer .. "\n") end
  end)
end

cli("set", "route set <key> <server>[,<server>...] [<model>]: route a model or a vmodel", function(key, list, model)
  if not key or not list then return "route set: give a key and its servers" end
  local names = {}
  for name in list:gmatch("[^,]+") do
    if not core.backends[SLOTS_BACKEND].servers[name] then return "route set: no server " .. name end
    names[#names + 1] = name
  end
  if #names == 0 then return "route set: no servers" end
  if not routes[key] then count = count + 1 end
  if model == "" then model = nil end
  if #names == 1 and not model then
    routes[key] = names[1]
  else
    routes[key] = {names = names, turn = math.random(0, #names - 1), model = model}
  end
end)

cli("del", "route del <key>: forget a model or a vmodel", function(key)
  if not key then return "route del: give a key" end
  if routes[key] then count = count - 1 end
  routes[key] = nil
end)

cli("get", "route get <key>: the servers of a model, with the model of a vmodel", function(key)
  local found = key and routes[key]
  if type(found) ~= "table" then return found or "" end
  return table.concat(found.names, ",") .. (found.model and " " .. found.model or "")
end)

cli("count", "route count: how many models are routed", function() return tostring(count) end)

cli("clear", "route clear: forget all models", function()
  routes, count = {}, 0
end)

-- With neither a gateway nor a runtime the mesh is gone; whoever kept this process is too. See `alone_max_s`.
local ALONE_MAX_S = tonumber(os.getenv("RAYMESH_ALONE_MAX_S"))
local PERIOD_S = math.min(5, ALONE_MAX_S / 4)

local function has_company()
  for _, backend in ipairs({"gateway_data", SLOTS_BACKEND}) do
    for _, server in pairs(core.backends[backend].servers) do
      if server:get_stats().status:sub(1, 2) == "UP" then return true end
    end
  end
  return false
end

core.register_task(function()
  local alone_s = 0
  while alone_s < ALONE_MAX_S do
    core.msleep(math.floor(PERIOD_S * 1000))
    alone_s = has_company() and 0 or alone_s + PERIOD_S
  end
  os.exit(0)
end)
