"""Sentence banks of the prompts, as data; all of it written for this toolkit.

Slots: `$n` is a number drawn afresh for each prompt (11 to 989; in log lines an ascending time
stamp, once per line). The others ($k and $u are numbers too) are filled when a bank is built.
English and Chinese subjects stand in the same order, so that mixed documents keep to their topic.
No text may hold a percent sign: prompts are put together with `%`.
"""

from typing import Final

PEOPLE: Final = {
    "en": ("Alice Moreno", "Ben Okafor", "Clara Lindqvist", "David Tanaka", "Erin Walsh",
           "Farid Haddad", "Grace Mbeki", "Hugo Castellan", "Ines Duarte", "Jonas Weber",
           "Kira Novak", "Liam Brennan", "Mona Salib", "Nora Eriksen", "Omar Siddiqui",
           "Petra Kowalski"),
    "zh": ("张伟", "王芳", "李娜", "刘洋", "陈静", "杨帆", "赵磊", "黄丽", "周涛", "吴敏",
           "徐强", "孙悦", "马俊", "朱琳", "胡斌", "郭晨曦"),
}
CITIES: Final = {
    "en": ("Lisbon", "Rotterdam", "Nairobi", "Osaka", "Valparaíso", "Gdansk", "Montreal",
           "Bristol", "Porto Alegre", "Leipzig", "Tallinn", "Auckland"),
    "zh": ("上海", "成都", "杭州", "武汉", "青岛", "西安", "厦门", "长沙", "南京", "昆明",
           "大连", "重庆"),
}
PRODUCTS: Final = {
    "en": ("Bluefin", "Northwind", "Cobalt", "Juniper", "Lantern", "Meridian", "Pinecone",
           "Quartz", "Saffron", "Tidewater"),
    "zh": ("青松系统", "晨星平台", "远航软件", "明镜助手", "春雨应用", "北斗终端", "磐石服务",
           "流云网关"),
}
NOUNS: Final = ("order", "invoice", "account", "session", "ticket", "shipment", "payment",
                "document", "sensor", "booking", "device", "report")
COMMENTS: Final = {
    "en": ("keeps the newest entry of each key", "the caller has checked the permissions",
           "slow for large inputs, see the ticket", "must not be called twice",
           "amounts are in cents", "the clock may jump, so never trust it",
           "an empty list means that nothing was found", "shared between two workers"),
    "zh": ("每个键只保留最新的一条记录", "调用者已经检查过权限", "数据量大时很慢，需要优化",
           "不能重复调用", "金额的单位是分", "系统时钟可能回拨，不要依赖它",
           "空列表表示没有找到结果", "由两个工作进程共享"),
}

# Documents: (heading, one sentence per line).
DOCUMENTS: Final = {
    "en": (
        ("The container port", """\
The container port of $city handled $n ships in the quarter, more than in any quarter before.
Pilots reported that fog had closed the outer channel for $n hours in total.
Crane $n was out of service while its cables were replaced by the night shift.
The harbour master, $person, asked for a second tug to be on call at weekends.
Trucks waited $n minutes at the gate on average, and twice as long on Mondays.
Refrigerated boxes are now checked by a sensor that calls the yard when it grows warm.
A new berth for $n thousand tonnes of grain is planned on the northern quay.
Dockers and managers agreed on a roster that leaves no one with two nights in a row.
Customs opened $n containers by hand, although the scanner had found nothing unusual.
The railway line behind the port carries only a third of what it was built for."""),
        ("Water for the city", """\
The waterworks of $city deliver water to $n thousand households through old iron mains.
Leaks were found at $n places after listening devices had been fixed to the hydrants.
In the dry summer the reservoir fell by $n centimetres within six weeks.
$person, who leads the laboratory, takes samples at each pumping station every morning.
Meters that report by radio have replaced the yearly visit in $n streets.
The council decided that pipes under schools and hospitals are to be renewed first.
A burst main flooded the market hall and cut off $n shops for two days.
Rain from the roofs of the new quarter is kept in cisterns and waters the parks.
The price of a cubic metre rose for the first time in ten years, by $n cents.
Engineers want to join the two networks so that one can help the other in a drought."""),
        ("Moving the payment system", """\
The team around $person moved the payment system to new machines in $n small steps.
Each step could be undone within a few minutes, and $n of them were in fact undone.
Both systems ran side by side for $n days, and every difference in a balance was explained.
The old database held columns that nobody could name, and some that nobody dared to drop.
$product took over the nightly batch, which had needed $n minutes and now needs nine.
A forgotten certificate stopped all card payments in $city for most of an afternoon.
Support answered $n calls on the first day, fewer than on an ordinary Monday.
The largest surprise was the clock: two hosts disagreed by $n milliseconds.
Nobody was allowed to change anything by hand, and so every change could be read later.
The report recommends that the rehearsal be repeated once a year, with real failures."""),
        ("Waiting times at the clinic", """\
Patients of the clinic in $city waited $n minutes before somebody spoke to them.
Since the desk was moved to the entrance, $n fewer people have left without being seen.
Doctor $person suggested that simple cases be treated by the nurses on the ground floor.
The laboratory sends results by message, which saves about $n telephone calls a day.
Two rooms stood empty on most afternoons because their equipment had not been ordered.
A survey with $n answers praised the staff and complained about the lack of chairs.
Appointments that are kept by video have doubled, mostly among people who live far away.
The night shift asked for a second doctor after $n emergencies in one week.
Medicines worth $n thousand euros expired because the store room had no list.
From spring on, the pharmacy next door will deliver to the wards twice a day."""),
        ("The solar park", """\
The solar park near $city covers $n hectares of a former gravel pit.
On a clear day in June its panels fed $n megawatts into the regional grid.
Hail broke $n panels in one night, and the insurer sent an expert with a drone.
Sheep keep the grass short between the rows; their owner, $person, pays no rent.
The batteries are charged at noon and emptied in the early evening when prices are high.
An inverter of the $product series failed $n times before its fan was replaced.
Neighbours feared glare, but a measurement at $n windows found none worth noting.
The grid operator may switch the park off, and did so for $n hours last year.
Dust from the quarry costs more yield than all clouds of a usual November.
A second field is to follow as soon as the new transformer station has been built."""),
        ("The public library", """\
The public library of $city lent $n thousand books and almost as many games.
Its reading room stays open until midnight, and $n students come on an ordinary evening.
Volunteers led by $person read to children in eleven languages every Saturday.
A catalogue from 1931 was scanned, and $n titles turned out to be missing.
The roof above the map collection leaked, so $n drawers had to be dried by hand.
Since fees for late returns were dropped, more books come back than before.
The workshop in the cellar has a printer for plastic parts and $n sewing kits.
Visitors can borrow a $product tablet, a measuring device or a ticket for the museum.
The branch on the hill was to be closed, but $n neighbours signed against it.
Next year the archive will move into the former post office across the square."""),
    ),
    "zh": (
        ("集装箱港口", """\
$city的集装箱港口本季度接待了$n艘货轮，创下历史新高。
引航员报告说，大雾使外航道累计关闭了$n个小时。
第$n号吊机因更换钢缆停用，夜班工人连续作业完成了维修。
港务负责人$person建议周末增派一艘值班拖轮。
卡车在闸口平均等待$n分钟，周一的等待时间更长。
冷藏箱装上了传感器，温度升高时会自动通知堆场。
北岸计划新建一个粮食泊位，设计能力为$n千吨。
工人与管理方商定了新的排班表，任何人都不必连续值两个夜班。
海关人工开箱检查了$n个集装箱，没有发现异常。
港口后方的铁路线目前只用到了设计运力的三分之一。"""),
        ("城市供水", """\
$city自来水公司通过老旧的铸铁管道为$n千户居民供水。
在消防栓上安装监听设备之后，一共找到了$n处漏点。
今年夏天干旱少雨，水库水位在六周内下降了$n厘米。
实验室主任$person每天早晨都要到各个泵站采集水样。
远程水表已经覆盖$n条街道，不再需要每年上门抄表。
市政府决定优先更换学校和医院地下的管道。
一条主管道爆裂，淹没了农贸市场，$n家商铺停水两天。
新城区的雨水被收集到蓄水池里，用来浇灌公园的树木。
水价十年来首次上调，每立方米增加了$n分钱。
工程师希望把两个管网连接起来，以便在旱季互相支援。"""),
        ("支付系统迁移", """\
$person带领的团队分$n个小步骤把支付系统迁移到了新机器上。
每一步都可以在几分钟内撤销，实际上有$n次被撤销过。
新旧系统并行运行了$n天，账目上的每一处差异都得到了解释。
旧数据库里有些字段没有人说得清用途，也没有人敢删除。
$product接管了夜间批处理，耗时从$n分钟缩短到九分钟。
一张被遗忘的证书过期，导致$city的刷卡支付中断了大半个下午。
上线第一天客服接到$n个电话，比平常的周一还要少。
最大的意外来自时钟：两台主机之间相差了$n毫秒。
任何人都不允许手工修改配置，因此所有改动都有据可查。
报告建议每年重复一次演练，并且使用真实的故障场景。"""),
        ("门诊等候时间", """\
在$city的这家医院，患者平均要等$n分钟才有人接待。
自从分诊台移到门口以后，未就诊就离开的人减少了$n位。
$person医生建议由一楼的护士处理简单的病例。
化验结果改用短信发送，每天大约节省$n个电话。
两间诊室下午经常空着，因为需要的设备一直没有采购。
一份收回$n份答卷的调查表扬了医护人员，也抱怨座椅太少。
视频问诊的数量翻了一番，主要是住得较远的患者在使用。
一周内出现$n次急诊之后，夜班要求再增加一名医生。
由于库房没有清单，价值$n千元的药品过期报废。
从春天开始，隔壁的药房每天会向病房送药两次。"""),
        ("太阳能电站", """\
$city附近的太阳能电站建在废弃的采石场上，占地$n公顷。
六月晴朗的一天，光伏板向地区电网输送了$n兆瓦的电力。
一夜冰雹打坏了$n块光伏板，保险公司派专家用无人机查勘。
羊群在成排的光伏板之间吃草，羊的主人$person不用交租金。
电池在中午充电，傍晚电价较高时再把电卖给电网。
$product使用的逆变器先后出现$n次故障，更换风扇后恢复正常。
居民担心反光刺眼，但是对$n扇窗户的测量没有发现问题。
电网公司有权让电站停机，去年一共停了$n个小时。
采石场的灰尘造成的损失，比整个冬天的阴云还要多。
新的变电站建成以后，第二期工程将马上开工。"""),
        ("公共图书馆", """\
$city公共图书馆去年借出$n千册图书，桌面游戏也很受欢迎。
阅览室开放到午夜，平常的晚上也有$n名学生来自习。
$person组织的志愿者每周六用多种语言给孩子们讲故事。
一份旧目录被扫描成电子版，结果发现有$n种书已经遗失。
地图室的屋顶漏水，$n个抽屉里的资料只能用手工晾干。
取消逾期罚款以后，按时归还的图书反而比以前更多了。
地下室的工作坊有三维打印机，还有$n套缝纫工具。
读者可以借用平板电脑、测量仪器，或者博物馆的门票。
山上的分馆原本计划关闭，$n位居民联名表示反对。
明年档案室将搬到广场对面的老邮局大楼里。"""),
    ),
}

CODE: Final = (
    """\
def load_${noun}s(path, limit=$n):
    # $comment
    rows = []
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            if len(rows) >= limit:
                break
            rows.append(parse_$noun(line.strip()))
    return rows
""",
    """\
class ${noun}_cache:
    # $comment
    def __init__(self, size=$n):
        self.size = size
        self.items = {}

    def get(self, key):
        return self.items.get(key)

    def put(self, key, value):
        if len(self.items) >= self.size:
            self.items.pop(next(iter(self.items)))
        self.items[key] = value
""",
    """\
async def fetch_$noun(client, ident):
    # $comment
    for attempt in range(3):
        answer = await client.get(f"/$noun/{ident}", timeout=$n)
        if answer.status == 200:
            return await answer.json()
        await asyncio.sleep(2 ** attempt)
    raise LookupError(ident)
""",
    """\
SELECT a.id, a.city, count(*) AS ${noun}s, sum(b.amount) AS total
FROM customers AS a JOIN ${noun}s AS b ON b.customer = a.id
WHERE b.amount > $n          -- $comment
GROUP BY a.id, a.city
ORDER BY total DESC
LIMIT 50;
""",
    """\
func count${noun}(items []string) map[string]int {
    // $comment
    seen := make(map[string]int, $n)
    for _, item := range items {
        seen[item]++
    }
    return seen
}
""",
    """\
function render_$noun(list) {
  // $comment
  const shown = list.filter((x) => x.total > $n);
  return shown.map((x) => `<li>${x.id}: ${x.total}</li>`).join("");
}
""",
    """\
def merge_${noun}s(left, right):
    # $comment
    merged, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        if left[i].stamp <= right[j].stamp + $n:
            merged.append(left[i])
            i += 1
        else:
            merged.append(right[j])
            j += 1
    return merged + left[i:] + right[j:]
""",
    """\
def test_${noun}_is_rejected_when_too_large():
    # $comment
    store = Store(limit=$n)
    with pytest.raises(ValueError):
        store.add($noun(size=store.limit + 1))
    assert store.count() == 0
""",
    """\
@dataclass(frozen=True)
class $noun:
    # $comment
    ident: int
    owner: str
    amount_cents: int = $n

    def is_open(self):
        return self.amount_cents > 0
""",
    """\
def bucket_$noun(value):
    # $comment
    if value < 0:
        raise ValueError(f"negative $noun: {value}")
    return (value * $n) & 1023
""",
    """\
struct $noun *find_$noun(struct $noun *head, int ident)
{
    /* $comment */
    int steps = 0;
    while (head && head->ident != ident && steps++ < $n)
        head = head->next;
    return head;
}
""",
    """\
pub fn total_$noun(items: &[u64]) -> Option<u64> {
    // $comment
    items.iter().take($n).try_fold(0u64, |sum, x| sum.checked_add(*x))
}
""",
    """\
for file in /var/spool/$noun/*.csv; do
  # $comment
  if [ "$(wc -l < "$file")" -gt $n ]; then
    gzip "$file"
  fi
done
""",
    """\
def retry_$noun(send, payload, attempts=$n):
    # $comment
    error = None
    for _ in range(attempts):
        try:
            return send(payload)
        except TimeoutError as e:
            error = e
    raise error
""",
    """\
${noun}:
  # $comment
  workers: $n
  queue: ${noun}-events
  on_failure: {retry: 3, then: park}
""",
)

LOGS: Final = {
    "en": (
        "$n INFO user=u$u city=$city action=view item=$product ms=$k",
        "$n INFO user=u$u action=search query=\"$noun near $city\" hits=$k",
        "$n INFO user=u$u action=add_to_cart item=$product quantity=2 price=$k.50",
        "$n INFO user=u$u action=checkout total=$k.00 city=$city",
        "$n WARN service=$noun slow query, $k ms, 3 rows",
        "$n ERROR service=$noun status=500 path=/api/$noun/$k",
        "$n ERROR payment declined user=u$u code=402",
        "$n INFO login user=u$u name=\"$person\" from=$city",
        "$n INFO logout user=u$u after=$k s",
        "$n DEBUG cache miss key=$noun:$k",
        "$n INFO {\"event\": \"click\", \"user\": $u, \"page\": \"/$noun\", \"city\": \"$city\"}",
        "$n INFO {\"event\": \"purchase\", \"user\": $u, \"item\": \"$product\", \"cents\": $k}",
        "$n WARN {\"event\": \"retry\", \"service\": \"$noun\", \"attempt\": 2, \"ms\": $k}",
        "$n INFO mail sent to=\"$person\" template=$noun size=$k",
        "$n ERROR timeout upstream=$product after=$k ms user=u$u",
    ),
    "zh": (
        "$n 信息 用户=$person 城市=$city 操作=浏览 商品=$product 耗时=$k毫秒",
        "$n 信息 用户=$person 操作=搜索 关键词=\"$city美食\" 结果=$k条",
        "$n 信息 用户=$person 操作=加入购物车 商品=$product 价格=$k元",
        "$n 信息 用户=$person 操作=下单 金额=$k元 城市=$city",
        "$n 警告 服务=$product 查询过慢 耗时=$k毫秒",
        "$n 错误 服务=$product 状态码=500 路径=/api/$noun/$k",
        "$n 错误 用户=$person 支付失败 错误码=$k",
        "$n 信息 用户=$person 登录 来自=$city",
        "$n 信息 {\"事件\": \"点击\", \"用户\": \"$person\", \"页面\": \"/$noun\", \"编号\": $k}",
        "$n 信息 {\"事件\": \"购买\", \"用户\": \"$person\", \"商品\": \"$product\", \"金额\": $k}",
        "$n 警告 {\"事件\": \"重试\", \"服务\": \"$product\", \"耗时\": $k}",
        "$n 信息 用户=$person 退出 停留=$k秒",
    ),
}

# Turns of a conversation: (question, answer). The questions alone also end a chat prompt.
CHAT: Final = {
    "en": (
        ("What can I cook with rice and two eggs?",
         "Fried rice: heat the rice in $n millilitres of oil, push it aside, scramble the eggs."),
        ("How do I get from $city to the airport?",
         "Take tram $n from the main square; it runs every ten minutes until midnight."),
        ("Can you explain compound interest simply?",
         "Interest is paid on earlier interest too, so $n coins grow faster every year."),
        ("What should I see in $city on a rainy day?",
         "Begin with the old covered market, then the museum, which shows $n paintings."),
        ("How often should I water a small olive tree?",
         "Once a week in summer; $n millilitres are enough if the pot has a hole."),
        ("My laptop is slow after the update. Any idea?",
         "See which program uses the memory first; more than $n open tabs is a usual cause."),
        ("Can you write a short note to thank $person?",
         "Dear $person, thank you for the help with project $n. It made all the difference."),
        ("Why is the sky red in the evening?",
         "The light crosses more air then, and what is blue has been scattered $n times over."),
        ("How do I prepare for a job interview at $product?",
         "Read what they published lately and tell one story about $n hours well spent."),
        ("What is a fair price for a used bicycle?",
         "Around $n euros if the brakes and the chain are sound; look at the frame in daylight."),
        ("Which book would you give to a curious child?",
         "One with experiments: there are collections of $n that need only kitchen things."),
        ("How long does a letter to $city take?",
         "Four days as a rule, but letter $n of my list once needed three weeks."),
    ),
    "zh": (
        ("家里只有米饭和两个鸡蛋，能做什么菜？",
         "可以做蛋炒饭：先把鸡蛋炒散，再放米饭，用大火炒$n秒就好。"),
        ("从$city市中心去机场怎么走最方便？",
         "可以坐$n路公交车到地铁站，再换乘机场线，大约一个小时。"),
        ("能不能简单解释一下什么是复利？",
         "利息也会产生利息，所以$n元本金存得越久，增长就越快。"),
        ("下雨天在$city有什么值得去的地方？",
         "可以先逛老街的室内市场，再去博物馆，那里展出$n件文物。"),
        ("小盆栽的橄榄树多久浇一次水？",
         "夏天每周一次，每次$n毫升就够了，花盆底部要有排水孔。"),
        ("电脑更新以后变得很慢，应该怎么办？",
         "先看看哪个程序占用内存最多，打开$n个网页也会让电脑变慢。"),
        ("帮我给$person写一段简短的感谢信。",
         "$person您好，感谢您在第$n号项目中的帮助，您的建议非常关键。"),
        ("为什么傍晚的天空是红色的？",
         "傍晚阳光穿过更厚的大气，蓝光被散射了$n次，剩下的多是红光。"),
        ("去$product的公司面试应该怎样准备？",
         "先了解他们最近的产品，再准备一个花了$n小时解决问题的例子。"),
        ("二手自行车多少钱比较合适？",
         "如果刹车和链条完好，$n元左右比较合理，最好白天去看车。"),
        ("送给好奇的孩子什么书比较好？",
         "可以选一本收录$n个小实验的书，只用厨房里的材料就能完成。"),
        ("寄一封信到$city要几天？",
         "一般四天左右，不过我的第$n封信曾经走了三个星期。"),
    ),
}

SPEAKERS: Final = {"en": ("User", "Assistant"), "zh": ("用户", "助手")}

# The line above the filler, by kind.
TITLES: Final = {
    "en": {"summary": "# Yearly report of $city, edited by $person",
           "code": "Code of the project $product, module $noun:",
           "json": "Log extract of $product, host $city:",
           "chat": "Our conversation so far:"},
    "zh": {"summary": "# $city年度报告，编辑：$person", "code": "项目“$product”的现有代码：",
           "json": "$product的用户行为日志：", "chat": "我们之前的对话："},
}

JSON_FIELDS: Final = ("total_events", "errors", "top_action", "summary")
_FIELDS = ", ".join(f'"{f}"' for f in JSON_FIELDS)

# What ends the prompt, by kind. A chat ends with a question of CHAT.
INSTRUCTIONS: Final = {
    "en": {
        "summary": ("Summarise the document above in three to five sentences, with its numbers.",
                    "Write a summary of this report for a reader who has one minute.",
                    "Name the main points of the text above, section by section."),
        "code": ("Add a function that removes duplicates from a list of records, with type hints.",
                 "Find the bug in the code above, explain it, and write the corrected version.",
                 "Write unit tests for the code above, including its edge cases."),
        "json": ("Analyse the log above. Answer with one JSON object and nothing else, with the "
                 f"fields {_FIELDS}.",
                 f"Report on this log as JSON with the fields {_FIELDS}."),
        "chat": tuple(question for question, _ in CHAT["en"]),
    },
    "zh": {
        "summary": ("请用三到五句话总结上面的文档，并保留其中的关键数字。",
                    "请为只有一分钟时间的读者写一份摘要。", "请逐节列出上文的要点。"),
        "code": ("请增加一个函数，去除记录列表中的重复项，并写上类型标注。",
                 "请找出上面代码中的错误，说明原因，并给出修改后的版本。",
                 "请为上面的代码编写单元测试，包括边界情况。"),
        "json": (f"请分析上面的日志，只输出一个 JSON 对象，字段为 {_FIELDS}。",
                 f"请用 JSON 汇报，字段为 {_FIELDS}。"),
        "chat": tuple(question for question, _ in CHAT["zh"]),
    },
}
# The same for prompts of a few tokens, longest first.
BRIEF: Final = {
    "en": {"summary": ("Summarise this.", "Sum up."), "code": ("Review this code.", "Review."),
           "json": ("Report as JSON.", "As JSON."), "chat": ("How are you?", "Hi")},
    "zh": {"summary": ("请总结。", "总结"), "code": ("请检查代码。", "检查"),
           "json": ("请用 JSON 汇报。", "汇报"), "chat": ("你好吗？", "好")},
}
